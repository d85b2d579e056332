"""What each part adds: which runs are made, by which flags, and how they are compared."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import medgemma_trainer as trainer
from conftest import SAMPLE
from finished_runs import write_run
from medgemma_clinical.commands.flags import complete
from medgemma_clinical.commands.logs import start_logging
from medgemma_clinical.commands.several import runs as several_runs
from medgemma_clinical.commands.several.ablation import (
    ARM_MEANINGS,
    ARMS,
    PARTS,
    STAGE_1,
    arm_arguments,
    chosen_arms,
    run_ablation,
)
from medgemma_clinical.evaluation.baselines import describe_baselines
from medgemma_clinical.files import InputError
from medgemma_clinical.models.sharing.model_card import RANDOM_MODEL

DATASET: Any = SimpleNamespace(outcome="Death")


def arguments(folder: Path, **changes: Any) -> Namespace:
    """The flags that ``--ablation`` looks at."""
    flags: dict[str, Any] = {
        "ablation": True,
        "arms": None,
        "base_weights": "pretrained",
        "dynamics": "ode",
        "facts": "on",
        "freeze_ode": False,
        "max_len": 9,
        "min_cell": 0,
        "mode": "classification",
        "model_name": "google/medgemma-4b-pt",
        "ode_checkpoint": None,
        "output_dir": folder,
        "reference": "stage 1",
        "resume": False,
        "seed": 0,
        "series_text": "all",
        "soft_prompt": "on",
        "stage1_logit": "on",
        "trajectory_only": False,
    }
    return Namespace(**{**flags, **changes})


class FakeTraining:
    """Writes finished runs in place of training, and counts what is asked of it."""

    def __init__(self) -> None:
        self.made: list[Namespace] = []

    def train(self, args: Namespace, dataset: Any) -> int:
        assert dataset is DATASET
        self.made.append(args)
        write_run(several_runs.stage_folder(args), len(self.made))
        return 0


@pytest.fixture
def unbegun(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run was begun before."""
    monkeypatch.setattr(several_runs, "run_progress", lambda args, dataset: "none")


def test_each_arm_has_flags_and_a_folder_of_its_own(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    made = [arm_arguments(name, args) for name in ARMS]
    assert len({several_runs.stage_folder(own) for own in made}) == len(ARMS)
    assert len({str({**vars(own), "output_dir": None}) for own in made}) == len(ARMS)
    assert all((own.max_len, own.ablation, own.seed) == (9, False, 0) for own in made)
    assert vars(args) == vars(arguments(tmp_path)), "the command's own arguments stay"


@pytest.mark.usefixtures("unbegun")
def test_every_arm_stands_beside_stage_1_and_the_baselines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, forgotten = FakeTraining(), []
    monkeypatch.setattr(several_runs, "reset_peak_memory", lambda: forgotten.append(1))
    with caplog.at_level(logging.INFO):
        assert run_ablation(arguments(tmp_path), DATASET, fake.train) == 0
    assert len(fake.made) == len(ARMS) == len(forgotten), "each arm has a peak of its own"
    results = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    assert list(results) == [*ARMS, "last value"]
    table = pd.read_csv(tmp_path / "ablation" / "predictions_test.csv", dtype={"id": str})
    assert list(table) == ["id", "patient", "label", *ARMS, "last value"]
    reference = roc_auc_score(table["label"], table[STAGE_1])
    for name, own in zip(ARMS, fake.made, strict=True):
        folder = several_runs.stage_folder(own)
        predictions = pd.read_csv(folder / "predictions_test.csv")
        auroc = roc_auc_score(predictions["label"], predictions["probability"])
        assert results[name]["auroc"]["value"] == pytest.approx(auroc)
        difference = results[name]["minus_reference"]["auroc"]
        assert difference["value"] == pytest.approx(auroc - reference)
        cost = {"seconds_an_epoch": 1.0, "tokens": 12.0}  # the median of 0, 1 and 2
        assert cost.items() <= results[name].items()
        assert results[name]["memory_mib"] == 100.0 + list(ARMS).index(name) + 1
        assert f"{name}: test AUROC " in caplog.text
    page = (tmp_path / "ablation" / "ablation.html").read_text()
    assert "What each part of the model adds: Death" in page
    assert list(ARM_MEANINGS) == list(ARMS)
    assert {arm for pair in PARTS.values() for arm in pair} == {*ARMS}, "each arm answers"
    box = page.split("Gain and cost")[0]
    for part, (one, other) in PARTS.items():
        gain = results[one]["auroc"]["value"] - results[other]["auroc"]["value"]
        assert f"{part[0].upper()}{part[1:]}: " in box
        assert f"The AUROC of {one} minus that of {other} is {gain:+.3f} [" in box
    for pair in ((STAGE_1, "states held"), ("text + logit", STAGE_1), ("text", "facts as text")):
        assert "The AUROC of {} minus that of {} is ".format(*pair) in box
    assert box.index("Facts: ") < box.index(" models, ") < box.index("The models beside ")
    for name, meaning in {**ARM_MEANINGS, **describe_baselines(["last value"])}.items():
        assert f"<dt>{name}</dt><dd>{meaning}</dd>" in page
    assert (tmp_path / "ablation" / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("unbegun")
def test_chosen_arms_are_made_with_stage_1_and_compared_with_the_named_reference(
    tmp_path: Path,
) -> None:
    fake = FakeTraining()
    args = arguments(tmp_path, arms=["text", "soft prompt"], reference="facts as text")
    assert run_ablation(args, DATASET, fake.train) == 0
    arms = ["stage 1", "facts as text", "text", "soft prompt"]
    results = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    assert list(results) == [*arms, "last value"]
    aurocs = {name: result["auroc"]["value"] for name, result in results.items()}
    for name, result in results.items():
        gain = aurocs[name] - aurocs["facts as text"]
        assert result["minus_reference"]["auroc"]["value"] == pytest.approx(gain)
    page = (tmp_path / "ablation" / "ablation.html").read_text()
    assert "the reference is facts as text" in page


@pytest.mark.usefixtures("unbegun")
def test_the_reference_may_be_a_baseline(tmp_path: Path) -> None:
    args = arguments(tmp_path, arms=["stage 1"], reference="last value")
    fake = FakeTraining()
    assert run_ablation(args, DATASET, fake.train) == 0
    results = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    assert (list(results), len(fake.made)) == (["stage 1", "last value"], 1)
    assert results["last value"]["minus_reference"]["auroc"]["value"] == 0


def test_an_unknown_arm_is_refused_before_all_training() -> None:
    assert chosen_arms(["text"], "blend") == ["stage 1", "text"]
    assert chosen_arms(None, "stage 1") == list(ARMS)
    with pytest.raises(InputError, match="--arms words: choose from stage 1, "):
        chosen_arms(["words", "text"], "stage 1")


@pytest.mark.usefixtures("unbegun")
def test_a_reference_that_the_data_do_not_have_is_refused_after_stage_1(tmp_path: Path) -> None:
    args, fake = arguments(tmp_path, arms=["text"], reference="facts alone"), FakeTraining()
    with pytest.raises(InputError, match=r"facts alone: choose from stage 1, .*, last value$"):
        run_ablation(args, DATASET, fake.train)
    assert [own.trajectory_only for own in fake.made] == [True]


@pytest.mark.usefixtures("unbegun")
def test_the_table_says_where_the_language_model_has_no_weight(tmp_path: Path) -> None:
    fake = FakeTraining()

    def train(args: Namespace, dataset: Any) -> int:
        fake.train(args, dataset)
        path = several_runs.stage_folder(args) / "metrics.json"
        weight = {"none": 0.0, "all": 0.5}[args.series_text]
        path.write_text(json.dumps({**json.loads(path.read_text()), "residual_weight": weight}))
        return 0

    args = arguments(tmp_path, arms=["soft prompt + logit", "text + soft prompt + logit"])
    assert run_ablation(args, DATASET, train) == 0
    page = (tmp_path / "ablation" / "ablation.html").read_text()
    said = "has weight 0, and so adds nothing to stage 1, in: soft prompt + logit."
    assert said in page
    results = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    assert results["text + soft prompt + logit"]["residual_weight"] == 0.5


@pytest.mark.usefixtures("unbegun")
@pytest.mark.parametrize(("title", "shown"), [("", True), ("seed 3, ", False)])
def test_of_several_seeds_only_the_pooled_table_is_printed(
    title: str, shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, handlers = FakeTraining(), logging.root.handlers[:]
    try:
        start_logging()
        run_ablation(arguments(tmp_path), DATASET, fake.train, title)
    finally:
        logging.root.handlers[:] = handlers
    out = capsys.readouterr().out
    assert [f"{title}{name}: test AUROC" in out for name in ARMS] == [True] * len(ARMS)
    assert ("Minus reference" in out) == shown
    assert (tmp_path / "ablation" / "ablation.html").exists()


def test_finished_arms_are_left_and_stopped_ones_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def progress(args: Namespace, _: Any) -> str:
        if args.soft_prompt == "off":
            return "part"
        return "all" if several_runs.stage_folder(args).exists() else "none"

    monkeypatch.setattr(several_runs, "run_progress", progress)
    fake = FakeTraining()
    write_run(tmp_path / "trajectory")
    with caplog.at_level(logging.INFO):
        assert run_ablation(arguments(tmp_path), DATASET, fake.train) == 0
    assert [own.resume for own in fake.made] == [False] * 3 + [True] * 3 + [False] * 5
    assert "stage 1: already there" in caplog.text
    assert "text: continued" in caplog.text


@pytest.mark.usefixtures("unbegun")
def test_an_arm_that_fails_ends_the_command_with_its_code(tmp_path: Path) -> None:
    fake = FakeTraining()

    def fails(args: Namespace, dataset: Any) -> int:
        return 143 if args.soft_prompt == "off" else fake.train(args, dataset)

    assert run_ablation(arguments(tmp_path), DATASET, fails) == 143
    assert len(fake.made) == 4
    assert not (tmp_path / "ablation" / "ablation.json").exists()


# --------------------------------------------------------------------------- by the command line


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Run the ablation once on the first sample stays; return its flags and output folder."""
    folder = tmp_path_factory.mktemp("ablation")
    data = folder / "data.csv"
    pd.read_csv(SAMPLE, nrows=60).to_csv(data, index=False)
    words = ["--ablation", "--data_path", str(data), "--model_name", "tiny", "--epochs", "1"]
    words += ["--trajectory_epochs", "2", "--output_dir", str(folder / "run")]
    # Flags of stages 2 and 3 alone do not stop the arm of stage 1.
    words += ["--gradient_accumulation", "2", "--max_text_tokens", "400", "--log_file", "none"]
    assert trainer.main(words) == 0
    return words, folder / "run"


def read_results(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "ablation" / "ablation.json").read_text())
    return results


def test_the_arms_are_trained_and_their_baselines_compared(
    ablation: tuple[list[str], Path],
) -> None:
    _, folder = ablation
    assert RANDOM_MODEL in (folder / "ablation" / "ablation.html").read_text()
    results = read_results(folder)
    assert list(results)[: len(ARMS)] == list(ARMS)
    assert {"logistic regression", "number of observations", "blend"} < set(results)
    combined = pd.read_csv(folder / "trajectory" / "predictions_test.csv")["combined"]
    joined = pd.read_csv(folder / "ablation" / "predictions_test.csv")
    assert joined["combined"].tolist() == combined.tolist(), "of stage 1, the reference"
    for name in ARMS:
        own = arm_arguments(name, arguments(folder))
        place = several_runs.stage_folder(own)
        flags = json.loads((place / "run.json").read_text())["arguments"]
        assert flags["trajectory_only"] == own.trajectory_only
        assert (flags["dynamics"], flags["facts"]) == (own.dynamics, own.facts)
        assert (flags["soft_prompt"], flags["series_text"]) == (own.soft_prompt, own.series_text)
        assert results[name]["memory_mib"] > 0
        assert bool(results[name]["tokens"]) == (not own.trajectory_only)
        assert bool(flags["ode_checkpoint"]) == bool(own.ode_checkpoint)


def test_the_ablation_makes_what_is_missing_and_no_more(
    ablation: tuple[list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, folder = ablation
    before, made, fit = read_results(folder), [], trainer.fit

    def counted(stage: Any, *rest: Any, **words: Any) -> Any:
        made.append(stage.name)
        return fit(stage, *rest, **words)

    monkeypatch.setattr(trainer, "fit", counted)
    assert trainer.main(words) == 0
    shown = capsys.readouterr().out
    assert made == []
    assert read_results(folder) == before
    assert shown.count("already there") == len(ARMS)
    assert len([line for line in shown.splitlines() if line.strip()]) < 40, "one screen"
    (folder / "ablation" / "soft_prompt" / "classification" / "metrics.json").unlink()
    assert trainer.main(words) == 0
    assert made == ["classification"]
    after = read_results(folder)
    for result in (before, after):
        del result["soft prompt"]["seconds_an_epoch"], result["soft prompt"]["memory_mib"]
    assert after == before
    assert trainer.main([*words, "--reference", "text", "--arms", "text"]) == 0
    assert made == ["classification"], "finished arms serve every comparison"


def test_other_flags_data_or_another_stage_1_make_an_arm_anew(
    ablation: tuple[list[str], Path],
) -> None:
    words, _ = ablation
    args = complete(trainer.build_parser().parse_args(words))
    own = arm_arguments("soft prompt", args)
    dataset = trainer.read_dataset(own)
    assert several_runs.run_progress(own, dataset) == "all"
    other = Namespace(**{**vars(own), "head_lr": 1e-2})
    assert several_runs.run_progress(other, dataset) == "none"
    fewer = dataset.subset(np.arange(len(dataset) - 1))
    assert several_runs.run_progress(own, fewer) == "none"
    content = own.ode_checkpoint.read_bytes()
    try:
        own.ode_checkpoint.write_bytes(content + b" ")
        assert several_runs.run_progress(own, dataset) == "none"
    finally:
        own.ode_checkpoint.write_bytes(content)
    assert several_runs.run_progress(own, dataset) == "all"
