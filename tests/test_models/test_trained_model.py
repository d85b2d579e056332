"""Trained models rebuilt from their folders, and stage 1 for the next stage."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataset_format import MIMICtrajectoryDataset
from dte_encoder import ClinicalODERNN
from language_models import (
    CPU,
    classifier_and_writer,
    data_of,
    llm_config,
    patients,
    rehash,
    save_text_checkpoint,
    stage1_for,
)
from medgemma_clinical.data.training_data import Data, prepare_data
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.files import InputError, write_json
from medgemma_clinical.models.checkpoints import (
    ADAPTER_CONFIG,
    TRAJECTORY_FILE,
    read_trajectory,
    save_llm,
    save_trajectory,
    stage1_config,
)
from medgemma_clinical.models.language_model import load_language_model
from medgemma_clinical.models.trained_model import (
    checkpoint_place,
    load_stage1,
    load_trained_model,
    read_trained_config,
)
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from trajectories import table_of

ENCODERS = {"ode_rnn": ClinicalODERNN}
RULE = DecisionRule(slope=1.5, intercept=-0.2, threshold=0.3)
PROMPTS = PromptOptions(series="last", context=False)


def save_stage1(folder: Path, data: Data, members: int = 2) -> Path:
    """Write a stage 1 file of a data set, untrained."""
    folder.mkdir(exist_ok=True)
    model = stage1_for(data.dataset, members)
    config = {
        "stage": "trajectory",
        **stage1_config(model),
        "decision": RULE.to_config(),
        **data.description(),
    }
    save_trajectory(folder / TRAJECTORY_FILE, model, config, data.training_patients())
    return folder / TRAJECTORY_FILE


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run's folder with all three stages, and the logits of their models for one batch."""
    run, data = tmp_path_factory.mktemp("run"), data_of(patients())
    (run / "trajectory").mkdir()
    save_stage1(run, data)
    parts = classifier_and_writer(members=2)
    batch = parts.collate(range(6))
    logits = {}
    for stage, model in (("classification", parts.classifier), ("generative", parts.writer)):
        decision, prompts = RULE.to_config(), asdict(PROMPTS)
        config = llm_config(model, stage, data, decision=decision, prompts=prompts)
        (run / stage).mkdir()
        save_llm(run / stage / "best", model, config)
        logits[stage] = model(batch).logit
    return {"run": run, "batch": batch, **logits}


@pytest.fixture
def run(saved: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(saved["run"], tmp_path / "run"))


# ------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("stage", ["classification", "generative"])
def test_a_model_is_rebuilt_to_the_last_bit(stage: str, saved: dict[str, Any]) -> None:
    trained = load_trained_model(saved["run"] / stage, ENCODERS)
    assert torch.equal(trained.model(saved["batch"]).logit, saved[stage])
    assert not trained.model.training
    assert trained.tokenizer is not None
    assert (trained.rule, trained.prompts) == (RULE, PROMPTS)


@pytest.mark.parametrize("key", ["stage1_logit", "shuffled", "residual_weight"])
def test_a_model_reads_what_it_read_in_training(key: str, run: Path, saved: dict[str, Any]) -> None:
    batch, before = saved["batch"], saved["classification"]
    best = run / "classification" / "best"
    rehash(best, **{key: {"stage1_logit": False, "shuffled": True, "residual_weight": 0.5}[key]})
    changed = load_trained_model(best, ENCODERS).model
    with torch.no_grad():
        output = changed(batch)
    assert not torch.allclose(output.logit, before, atol=1e-3)
    assert bool(output.offset.any()) == (key != "stage1_logit")


@pytest.mark.parametrize("place", ["trajectory", TRAJECTORY_FILE])
def test_stage_1_is_found_by_its_folder_and_by_its_file(place: str, saved: dict[str, Any]) -> None:
    dataset = data_of(patients()).dataset
    trained = load_trained_model(saved["run"] / place, ENCODERS)
    batch = dataset.collate(range(6))
    assert torch.equal(trained.model(batch).logit, stage1_for(dataset, 2)(batch).logit)
    assert (trained.tokenizer, trained.rule) == (None, RULE)


def test_a_folder_best_is_a_place_of_its_own(run: Path) -> None:
    alone = run / "downloaded"
    (run / "classification" / "best").rename(alone)
    assert checkpoint_place(alone) == alone
    assert read_trained_config(alone)["stage"] == "classification"


def test_a_folder_of_stage_1_alone_is_its_model_and_a_runs_folder_is_none(run: Path) -> None:
    alone = run / "shared"
    alone.mkdir()
    shutil.copy(run / TRAJECTORY_FILE, alone)
    assert checkpoint_place(alone) == alone / TRAJECTORY_FILE
    with pytest.raises(InputError, match="holds no trained model: name the folder trajectory"):
        checkpoint_place(run)


def test_a_place_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder: name the folder trajectory"):
        load_trained_model(tmp_path / "nowhere", ENCODERS)
    with pytest.raises(InputError, match="holds no trained model"):
        load_trained_model(tmp_path, ENCODERS)


def test_parts_that_the_weights_do_not_have_are_refused(run: Path) -> None:
    rehash(run / "generative" / "best", members=1)
    with pytest.raises(InputError, match="damaged, or not made from this base model") as caught:
        load_trained_model(run / "generative", ENCODERS)
    assert "\n" not in str(caught.value)


def test_an_adapter_names_no_place_to_load_from(run: Path, saved: dict[str, Any]) -> None:
    best = run / "classification" / "best"
    adapter = json.loads((best / ADAPTER_CONFIG).read_text())
    evil = {**adapter, "base_model_name_or_path": "evil/model"}
    (best / ADAPTER_CONFIG).write_text(json.dumps(evil))
    rehash(best)
    trained = load_trained_model(run / "classification", ENCODERS)
    assert torch.equal(trained.model(saved["batch"]).logit, saved["classification"])


def test_an_unsound_decision_rule_is_refused(run: Path) -> None:
    decision = {"slope": -1.0, "intercept": 0.0, "threshold": 0.5}
    rehash(run / "classification" / "best", decision=decision)
    with pytest.raises(InputError, match=r"damaged: decision\.slope -1\.0: expected a finite"):
        read_trained_config(run / "classification")


@pytest.mark.parametrize(
    ("changes", "problem"), [({"width": 3}, "unexpected keyword"), ({"solver": "x"}, "solver 'x'")]
)
def test_an_encoder_with_other_keywords_is_refused(
    changes: dict[str, Any], problem: str, run: Path
) -> None:
    content = torch.load(run / TRAJECTORY_FILE, weights_only=True)
    content["config"]["encoder"] |= changes
    torch.save(content, run / TRAJECTORY_FILE)
    with pytest.raises(InputError, match=f"the checkpoint's encoder ode_rnn: .*{problem}"):
        load_trained_model(run / TRAJECTORY_FILE, ENCODERS)


def test_an_encoder_that_the_program_lacks_is_named(run: Path) -> None:
    with pytest.raises(InputError, match="encoder ode_rnn is none of gru_d"):
        load_trained_model(run / TRAJECTORY_FILE, {"gru_d": ClinicalODERNN})


# ------------------------------------------------------------------------------- the base model


@pytest.fixture
def on_folder(tmp_path: Path) -> tuple[Path, Path]:
    """A stage folder whose base model is a folder, and that folder."""
    base, data = save_text_checkpoint(tmp_path / "models" / "gemma"), data_of(patients())
    llm, _ = load_language_model(str(base), "none", torch.float32, CPU)
    model = classifier_and_writer(base=llm).classifier
    stage = tmp_path / "run" / "classification"
    stage.mkdir(parents=True)
    save_llm(stage / "best", model, llm_config(model, "classification", data, base=base))
    write_json(stage / "run.json", {"arguments": {"model_name": str(base)}})
    return stage, base


def test_the_place_of_a_base_model_is_known_to_its_run_alone(
    on_folder: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage, base = on_folder
    with caplog.at_level("INFO"):
        expected = load_trained_model(stage, ENCODERS)
    assert "language model: gemma, a folder, named by the checkpoint" in caplog.text
    assert str(tmp_path) not in caplog.text
    shared = stage.rename(tmp_path / "shared") / "best"
    (shared.parent / "run.json").unlink()
    with pytest.raises(
        InputError, match=r"its base model is a folder named gemma, .* give it by --model_name"
    ):
        load_trained_model(shared, ENCODERS)
    found = load_trained_model(shared, ENCODERS, model_name=str(base))
    state = expected.model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in found.model.state_dict().items())
    assert "make sure" not in caplog.text


def test_a_base_model_of_other_content_is_refused(
    on_folder: tuple[Path, Path], tmp_path: Path
) -> None:
    stage, base = on_folder
    other = save_text_checkpoint(tmp_path / "other", seed=9)
    with pytest.raises(InputError, match="another base model than gemma"):
        load_trained_model(stage, ENCODERS, model_name=str(other))
    shutil.copy(other / "model.safetensors", base)
    with pytest.raises(InputError, match="another base model than gemma"):
        load_trained_model(stage, ENCODERS)


def test_a_base_model_that_cannot_be_compared_is_warned_of(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rehash(run / "classification" / "best", base_model="google/medgemma-4b-pt")
    load_trained_model(run / "classification", ENCODERS, model_name="tiny")
    assert "was trained on google/medgemma-4b-pt: make sure that tiny is the same" in caplog.text


# ------------------------------------------------------------------------------- stage 1 by itself


def many(**columns: Any) -> MIMICtrajectoryDataset:
    """Sixty patients whose series all differ."""
    rng = np.random.default_rng(5)
    series = [
        " -> ".join(f"{rng.uniform(8, 30):.3f} ({t}h)" for t in range(0, 12, 3)) for _ in range(60)
    ]
    return MIMICtrajectoryDataset(table_of(series, **columns))


def drawn(dataset: MIMICtrajectoryDataset, seed: int, most: int = 0) -> Data:
    return prepare_data(dataset, max_samples=most, seed=seed, prompts=PromptOptions())


def load(path: Path, data: Data, **flags: Any) -> TrajectoryClassifier:
    """Load stage 1 for a run whose command line has some flags beside the defaults."""
    given = {"solver": "rk4", "time_scale": None, "dynamics": "ode", "members": 1}
    given |= {"facts": "on", "prediction_time": "on", **flags}
    return load_stage1(read_trajectory(path), ENCODERS, given, data)


def test_stage_1_is_the_one_that_was_trained(tmp_path: Path) -> None:
    data = data_of(patients())
    stage1 = load(save_stage1(tmp_path, data), data, solver="euler")
    expected = stage1_for(data.dataset, 2)
    batch = data.dataset.collate(range(5))
    expected.get_submodule("members.0.encoder").solver = "euler"  # type: ignore[assignment]
    expected.get_submodule("members.1.encoder").solver = "euler"  # type: ignore[assignment]
    assert torch.equal(stage1(batch).logit, expected(batch).logit)
    assert stage1.encoder.config["solver"] == "euler"


NAMED = {"subject_id": [f"patient {k}" for k in range(60)]}
NOTES = [f"note {k}" for k in range(60)]


@pytest.mark.parametrize(
    ("columns", "contexts", "seed", "most", "rows"),
    [
        (NAMED, True, 1, 0, 60),
        ({}, True, 1, 0, 60),
        (NAMED, False, 0, 30, 60),
        ({}, True, 0, 0, 50),
    ],
)
def test_patients_who_trained_are_never_held_out_whatever_the_file(
    tmp_path: Path, columns: dict[str, Any], contexts: bool, seed: int, most: int, rows: int
) -> None:
    """Another split, other contexts, a sample of the patients, a file with fewer of them."""
    path = save_stage1(tmp_path, drawn(many(**columns), 0))
    other = many(**columns, **({"clinical_context": NOTES} if contexts else {}))
    data = drawn(other.subset(np.arange(rows)), seed, most)
    count = sum(len(data.split[part]) for part in ("val", "test"))
    with pytest.raises(
        InputError, match=rf"\d+ of {count} held-out patients trained this encoder: use the same"
    ):
        load(path, data)


@pytest.mark.parametrize("columns", [NAMED, {}])
def test_the_same_patients_in_the_same_split_pass_with_other_contexts(
    tmp_path: Path, columns: dict[str, Any]
) -> None:
    path = save_stage1(tmp_path, drawn(many(**columns), 0))
    data = drawn(many(**columns, clinical_context=NOTES), 0)
    encoder = load(path, data).encoder
    assert encoder.config["hidden_dim"] == encoder.hidden_dim


def test_patients_of_another_file_pass_with_a_warning_where_they_have_no_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_stage1(tmp_path, drawn(many(), 0))
    load(path, data_of(patients()))
    assert "make sure that none of its training patients is held out" in caplog.text
    caplog.clear()
    path = save_stage1(tmp_path, drawn(many(subject_id=[f"x{k}" for k in range(60)]), 0))
    load(path, data_of(patients()))
    assert caplog.text == ""


@pytest.mark.parametrize("key", ["outcome", "features", "units"])
def test_an_encoder_of_other_data_is_refused(tmp_path: Path, key: str) -> None:
    path = save_stage1(tmp_path, drawn(many(), 0))
    other = many()
    setattr(other, key, "Death" if key == "outcome" else ("Lactate",))
    with pytest.raises(InputError, match=f"trained on {key} .*, the data have "):
        load(path, drawn(other, 0))


@pytest.mark.parametrize(
    ("flag", "same", "other", "stored"),
    [
        ("time_scale", 72.0, 24.0, r"72\.0"),
        ("dynamics", "ode", "decay", "ode"),
        ("members", 2, 3, "2"),
    ],
)
def test_a_flag_that_differs_from_stage_1_is_refused(
    tmp_path: Path, flag: str, same: Any, other: Any, stored: str
) -> None:
    data = data_of(patients())
    path = save_stage1(tmp_path, data)
    load(path, data, **{flag: same})
    with pytest.raises(InputError, match=rf"its --{flag} is {stored}: leave the flag out"):
        load(path, data, **{flag: other})


@pytest.mark.parametrize("flag", ["facts", "prediction_time"])
def test_an_input_of_stage_1_cannot_be_left_out(tmp_path: Path, flag: str) -> None:
    data = data_of(patients())
    path = save_stage1(tmp_path, data)
    with pytest.raises(InputError, match=f"trained with --{flag} on: leave the flag out"):
        load(path, data, **{flag: "off"})
    without: dict[str, Any] = {"facts": [], "prediction_time": True}
    without |= {"prediction_time": False} if flag == "prediction_time" else {}
    bare = prepare_data(
        patients(), max_samples=0, seed=0, prompts=PromptOptions(), inputs=without, min_cell=0
    )
    load(save_stage1(tmp_path / "bare", bare), bare, **{flag: "off"})
