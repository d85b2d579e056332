"""Checkpoints: written whole, read to the last bit; damage and code in them are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
from medgemma_clinical.files import InputError, json_hash
from medgemma_clinical.models.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHECKPOINT_FORMAT,
    CONFIG,
    HASHED_FILES,
    MODULE_WEIGHTS,
    TRAJECTORY_FILE,
    load_llm,
    load_trajectory,
    read_config,
    read_trajectory,
    save_llm,
    save_trajectory,
    stage1_config,
)
from medgemma_clinical.models.language_model import load_language_model
from medgemma_clinical.models.sharing.model_card import model_card
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

DATA = data_of(patients())


class Code:
    """Runs when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.ran,)


def new_classifier(seed: int) -> TrajectoryClassifier:
    model = stage1_for(DATA.dataset, members=2)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def disturb(model: TrajectoryLLM, seed: int) -> TrajectoryLLM:
    """Move all that learns, so that nothing is as it was initialised."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def stage1(tmp_path: Path) -> Path:
    """A stage 1 file."""
    path = tmp_path / TRAJECTORY_FILE
    model = new_classifier(1)
    config = {"stage": "trajectory", **stage1_config(model), **DATA.description()}
    save_trajectory(path, model, config, DATA.training_patients())
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrajectoryLLM, Path]:
    """A stage 2 model on the text-only checkpoint, and its folder."""
    llm, _ = load_language_model(str(base), "none", torch.float32, CPU)
    model = disturb(classifier_and_writer(base=llm, members=2).classifier, 0)
    folder = tmp_path_factory.mktemp("run") / "best"
    save_llm(folder, model, llm_config(model, "classification", DATA, base=base))
    return model, folder


@pytest.fixture
def best(saved: tuple[TrajectoryLLM, Path], tmp_path: Path) -> Path:
    """A copy of the stage 2 folder that a test may change."""
    return Path(shutil.copytree(saved[1], tmp_path / "best"))


# ------------------------------------------------------------------------------- stage 1


def test_a_reloaded_stage_1_model_gives_the_same_logits_to_the_last_bit(stage1: Path) -> None:
    batch = DATA.dataset.collate(range(len(DATA.dataset)))
    fresh, expected = new_classifier(2), new_classifier(1)(batch).logit
    assert not (fresh(batch).logit == expected).any()
    load_trajectory(fresh, read_trajectory(stage1))
    assert torch.equal(fresh(batch).logit, expected)


def test_a_stage_1_file_knows_who_trained_and_names_nobody(stage1: Path) -> None:
    checkpoint = read_trajectory(stage1)
    assert np.array_equal(checkpoint.train_patients, DATA.training_patients())
    assert checkpoint.config["features"] == ["Anion gap"]
    inputs = {"facts": ["static_bmi [kg/m2]", "static_admissions"], "prediction_time": True}
    assert (checkpoint.config["inputs"], checkpoint.config["members"]) == (inputs, 2)
    assert b"patient 0" not in stage1.read_bytes()


@pytest.mark.parametrize("place", ["config", "format", "plain pickle"])
def test_code_in_a_stage_1_file_does_not_run(place: str, stage1: Path, tmp_path: Path) -> None:
    code, content = Code(tmp_path / "ran"), torch.load(stage1, weights_only=True)
    if place == "plain pickle":
        stage1.write_bytes(pickle.dumps(code))
    elif place == "format":
        torch.save({**content, "format": code}, stage1)
    else:
        torch.save({**content, place: {**content[place], "more": code}}, stage1)
    with pytest.raises(InputError, match="not a stage 1 checkpoint"):
        read_trajectory(stage1)
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_an_older_format_and_a_lost_part_are_named(stage1: Path) -> None:
    with pytest.raises(InputError, match="no such stage 1 checkpoint: run --trajectory_only"):
        read_trajectory(stage1.with_name("other.pt"))
    content = torch.load(stage1, weights_only=True)
    torch.save({**content, "format": 3}, stage1)
    with pytest.raises(InputError, match=r"checkpoint format 3, this program reads \d+: train"):
        read_trajectory(stage1)
    torch.save({key: content[key] for key in content if key != "weights"}, stage1)
    with pytest.raises(InputError, match="not a stage 1 checkpoint, or damaged"):
        read_trajectory(stage1)


@pytest.mark.parametrize(
    "patients",
    [
        torch.zeros(3),
        torch.zeros(3, 1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64).expand(10**12),
        [1, 2],
    ],
    ids=["float", "two axes", "endless", "list"],
)
def test_patients_that_trained_are_a_list_of_hashes(patients: Any, stage1: Path) -> None:
    content = torch.load(stage1, weights_only=True)
    torch.save({**content, "train_patients": patients}, stage1)
    with pytest.raises(InputError, match="not a stage 1 checkpoint, or damaged"):
        read_trajectory(stage1)


@pytest.mark.parametrize("weights", [[], {1: torch.ones(2)}, {"attention.weight": "x"}])
def test_weights_of_another_type_do_not_fit(weights: Any, stage1: Path) -> None:
    content = torch.load(stage1, weights_only=True)
    torch.save({**content, "weights": weights}, stage1)
    with pytest.raises(InputError, match="its weights do not fit"):
        load_trajectory(new_classifier(2), read_trajectory(stage1))


def test_facts_of_a_stage_1_file_are_checked(stage1: Path) -> None:
    content = torch.load(stage1, weights_only=True)
    for changes, problem in (
        ({"encoder": {"name": "ode_rnn", "hidden_dim": 10**9}}, r"encoder\.hidden_dim 1000000000"),
        ({"case_mix": {"rows": torch.ones(1)}}, "case_mix"),
        ({"stage": "generative"}, "stage 'generative'"),
    ):
        torch.save({**content, "config": {**content["config"], **changes}}, stage1)
        with pytest.raises(InputError, match=f"{TRAJECTORY_FILE}: damaged: {problem}"):
            read_trajectory(stage1)


# ------------------------------------------------------------------------------- stages 2 and 3


def test_a_reloaded_model_gives_the_same_logits_to_the_last_bit(tmp_path: Path) -> None:
    parts = classifier_and_writer(members=2)
    model, batch = disturb(parts.writer, 0), parts.collate(range(6))
    expected = model(batch)
    save_llm(tmp_path / "best", model, llm_config(model, "generative", DATA))
    assert torch.equal(model(batch).logit, expected.logit), "saving changed the model"
    fresh = disturb(classifier_and_writer(members=2).writer, 9)
    assert not (fresh(batch).logit == expected.logit).any()
    load_llm(fresh, tmp_path / "best")
    found = fresh(batch)
    assert torch.equal(found.logit, expected.logit)
    assert torch.equal(found.loss, expected.loss)


def test_a_trained_model_is_these_files(saved: tuple[TrajectoryLLM, Path]) -> None:
    _, best = saved
    files = {str(path.relative_to(best)) for path in best.rglob("*") if path.is_file()}
    assert files == {*HASHED_FILES, CONFIG, "README.md", "NOTICE"}
    assert [path.name for path in best.parent.iterdir()] == ["best"]
    assert "HAI-DEF is provided under and subject to" in (best / "NOTICE").read_text()


def test_a_trained_model_holds_only_what_was_learned(saved: tuple[TrajectoryLLM, Path]) -> None:
    model, best = saved
    modules = load_file(best / MODULE_WEIGHTS)
    assert set(modules) == {k for k in model.state_dict() if not k.startswith("llm.")}
    parts = {"stage1", "projection", "head"}
    assert {k.split(".")[0] for k in modules} == parts
    adapter = load_file(best / ADAPTER_WEIGHTS)
    assert len(adapter) == 2 * 7 * 2
    assert all("lora_" in key for key in adapter)


def test_its_card_and_configuration_hold_no_path_and_no_patient(
    saved: tuple[TrajectoryLLM, Path], base: Path
) -> None:
    config = read_config(saved[1])
    assert config["base_model"] == base.name
    assert (saved[1] / "README.md").read_text() == model_card(config)
    files = [path for path in saved[1].rglob("*") if path.is_file()]
    assert not [path for path in files if str(base).encode() in path.read_bytes()]
    assert "patient 0" not in model_card(config) + (saved[1] / CONFIG).read_text()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_the_adapter_loads_with_plain_peft(saved: tuple[TrajectoryLLM, Path], base: Path) -> None:
    model, best = saved
    plain, _ = load_language_model(str(base), "none", torch.float32, CPU)
    ids = torch.arange(6, 40)[None]
    before = plain(input_ids=ids).logits
    adapted = peft.PeftModel.from_pretrained(plain, best / "adapter").eval()
    expected = model.llm.eval()(input_ids=ids).logits
    assert torch.equal(adapted(input_ids=ids).logits, expected)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_the_adapter_configuration_depends_on_no_order_of_hashes(best: Path) -> None:
    targets = json.loads((best / ADAPTER_CONFIG).read_text())["target_modules"]
    assert targets == sorted(targets)


# ------------------------------------------------------------------------------- damage


def test_further_files_and_a_hubs_links_do_not_matter(
    best: Path, saved: tuple[TrajectoryLLM, Path]
) -> None:
    for name in (".DS_Store", "adapter/._adapter_config.json", "notes.txt"):
        (best / name).write_bytes(b"\0")
    (best / "README.md").write_text("# edited by its owner\n")
    blobs = best.parent / "blobs"
    blobs.mkdir()
    for number, name in enumerate((*HASHED_FILES, CONFIG)):  # as in a snapshot of the hub
        (best / name).rename(blobs / str(number))
        (best / name).symlink_to(os.path.relpath(blobs / str(number), (best / name).parent))
    assert read_config(best) == read_config(saved[1])
    fresh = disturb(classifier_and_writer(members=2).classifier, 9)
    load_llm(fresh, best)
    head = fresh.get_submodule("head").state_dict()
    assert torch.equal(head["weight"], saved[0].get_submodule("head").state_dict()["weight"])


@pytest.mark.parametrize("name", HASHED_FILES)
def test_a_damaged_file_is_named(name: str, best: Path) -> None:
    content = (best / name).read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), None):
        (best / name).unlink() if damaged is None else (best / name).write_bytes(damaged)
        with pytest.raises(
            InputError, match=f"damaged: {name} is missing or not as it was written"
        ):
            read_config(best)


def unhashed(best: Path) -> None:
    config = json.loads((best / CONFIG).read_text())
    (best / CONFIG).write_text(json.dumps({**config, "outcome": "other"}))


def unlisted(best: Path) -> None:
    config = json.loads((best / CONFIG).read_text())
    config.pop("config_sha256")
    config["files_sha256"].pop(MODULE_WEIGHTS)
    (best / CONFIG).write_text(json.dumps({**config, "config_sha256": json_hash(config)}))


def older(best: Path) -> None:
    config = json.loads((best / CONFIG).read_text())
    config.pop("format")
    (best / CONFIG).write_text(json.dumps(config))


def test_facts_of_a_folder_are_checked_before_anything_is_built(best: Path) -> None:
    rehash(best, num_prefix_tokens=10**9)
    with pytest.raises(InputError, match="damaged: num_prefix_tokens 1000000000: expected a whole"):
        read_config(best)
    rehash(best, num_prefix_tokens=4)
    adapter = json.loads((best / ADAPTER_CONFIG).read_text())
    (best / ADAPTER_CONFIG).write_text(json.dumps({**adapter, "r": 10**9}))
    rehash(best)
    with pytest.raises(InputError, match=r"adapter_config\.json: damaged: r 1000000000: expected"):
        read_config(best)


@pytest.mark.parametrize(
    "text", ["[]", "3", json.dumps({"format": CHECKPOINT_FORMAT, "files_sha256": 3}), "{"]
)
def test_a_configuration_that_is_no_object_is_refused(text: str, best: Path) -> None:
    (best / CONFIG).write_text(text)
    with pytest.raises(InputError, match=r"damaged: config\.json cannot be read"):
        read_config(best)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unhashed, "config.json is missing or not as it was written"),
        (unlisted, "modules.safetensors is missing or not as it was written"),
        (older, "checkpoint format None, this program reads"),
    ],
)
def test_a_changed_configuration_is_refused(
    change: Callable[[Path], None], reason: str, best: Path
) -> None:
    change(best)
    with pytest.raises(InputError, match=reason):
        read_config(best)


def lose_a_weight(best: Path, name: str) -> None:
    weights = load_file(best / name)
    lost = sorted(weights)[-1]
    save_file({key: weights[key] for key in weights if key != lost}, best / name)


def add_a_weight(best: Path, name: str) -> None:
    weights: dict[str, Tensor] = {**load_file(best / name), "more.lora_A.weight": torch.ones(2)}
    save_file(weights, best / name)


@pytest.mark.parametrize("name", [MODULE_WEIGHTS, ADAPTER_WEIGHTS])
@pytest.mark.parametrize("change", [lose_a_weight, add_a_weight])
def test_every_key_must_fit_the_model(
    change: Callable[[Path, str], None], name: str, best: Path, saved: tuple[TrajectoryLLM, Path]
) -> None:
    change(best, name)
    rehash(best)
    with pytest.raises(InputError, match="its weights do not fit"):
        load_llm(saved[0], best)


@pytest.mark.parametrize("name", [MODULE_WEIGHTS, ADAPTER_WEIGHTS])
def test_code_in_weights_does_not_run(
    name: str, best: Path, saved: tuple[TrajectoryLLM, Path], tmp_path: Path
) -> None:
    harm = pickle.dumps({"weights": Code(tmp_path / "ran")})
    (best / name).write_bytes(harm)
    (best / "adapter" / "adapter_model.bin").write_bytes(harm)
    rehash(best)
    with pytest.raises(InputError, match="its weights do not fit"):
        load_llm(saved[0], best)
    assert not (tmp_path / "ran").exists()


def test_any_bit_that_is_turned_in_a_stage_1_file_is_noticed(stage1: Path) -> None:
    """At places spread over the file; padding of an archive may be anything."""

    def read() -> str:
        checkpoint = read_trajectory(stage1)
        return repr((checkpoint.config, checkpoint.weights))

    whole, content, noticed = read(), stage1.read_bytes(), 0
    for k in range(24):
        at = k * (len(content) - 1) // 23
        stage1.write_bytes(content[:at] + bytes([content[at] ^ 1 << k % 8]) + content[at + 1 :])
        try:
            assert read() == whole
        except InputError:
            noticed += 1
    assert noticed >= 12


def test_a_stage_1_file_that_unpacks_is_refused_before_it_does(stage1: Path) -> None:
    members = zipfile.ZipFile(stage1)
    packed = stage1.with_name("packed.pt")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in members.namelist():
            archive.writestr(name, members.read(name))
    with pytest.raises(InputError, match="not a stage 1 checkpoint, or damaged"):
        read_trajectory(packed)


def test_weights_that_are_no_floating_point_numbers_are_refused(
    saved: tuple[TrajectoryLLM, Path], best: Path, stage1: Path
) -> None:
    content = torch.load(stage1, weights_only=True)
    content["weights"] = {name: tensor.long() for name, tensor in content["weights"].items()}
    torch.save(content, stage1)
    with pytest.raises(InputError, match="do not fit"):
        load_trajectory(new_classifier(0), read_trajectory(stage1))
    weights = load_file(best / MODULE_WEIGHTS)
    save_file({name: tensor.long() for name, tensor in weights.items()}, best / MODULE_WEIGHTS)
    rehash(best)
    with pytest.raises(InputError, match="do not fit"):
        load_llm(saved[0], best)
