"""Checkpoints: written whole, loaded to the bit; damage and code are refused."""

import json
import os
import pickle
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import language_models as small
import medgemma_trainer as trainer
from medgemma_clinical.distributed import set_environment
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.files import InputError, write_json
from medgemma_clinical.models import checkpoints, language_model
from medgemma_clinical.models.checkpoints import read_config, read_trajectory, stage1_config
from medgemma_clinical.models.trained_model import checkpoint_path, load_trained_model
from predicting import command, refused

STAGES = ("trajectory", "classification", "generative")
STAGE_1, BEST = checkpoints.TRAJECTORY_FILE, "classification/best"
CONFIG, HASHED = checkpoints.CONFIG, checkpoints.HASHED_FILES
ADAPTER_CONFIG, ADAPTER, MODULES = HASHED
RULE = DecisionRule(multiplier=1.5, shift=-0.2, threshold=0.3)
ENCODER = {"input_dim": 1, "hidden_dim": 64, "time_scale": 72.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of three stages on a base model in a folder, a batch, and what each model gives."""
    run, data = tmp_path_factory.mktemp("run"), small.data_of(small.patients())
    base = small.save_text_checkpoint(tmp_path_factory.mktemp("models") / "gemma")
    parts = small.classifier_and_writer(base, members=2)
    for parameter in filter(lambda each: each.requires_grad, parts.classifier.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape)  # nothing is as it was drawn
    stage1, batch = parts.classifier.stage1, parts.collate(range(6))
    models = dict(zip(STAGES, (stage1, parts.classifier, parts.writer), strict=True))
    outputs = {stage: model(batch) for stage, model in models.items()}
    rule, own = {"decision": {"label": asdict(RULE)}}, stage1_config(stage1)
    config = {"stage": "trajectory", **own, **data.description(), **rule}
    parts = stage1.state_dict(), config, data.training_patients()
    checkpoints.save_trajectory(run / STAGE_1, *parts)
    for stage, model in models.items():
        (run / stage).mkdir()
        if stage != "trajectory":
            config = small.llm_config(model, stage, data, base=base, **rule)
            checkpoints.save_llm(run / stage / "best", model, config)
        write_json(run / stage / "run.json", {"arguments": {"model_name": str(base)}})
        assert torch.equal(model(batch).logit, outputs[stage].logit), "saving changed the model"
    return SimpleNamespace(run=run, base=base, batch=batch, outputs=outputs)


@pytest.fixture
def run(saved, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(saved.run, tmp_path / "run")


def load(path, **options):
    return load_trained_model(path, trainer.BUILDERS, **options)


def assert_refused(path, *words):
    """Expect that a checkpoint is refused with its path."""
    with pytest.raises(InputError, match=".*".join(map(re.escape, map(str, (path, *words))))):
        load(path)


# ------------------------------------------------------------------------------- written, loaded


@pytest.mark.parametrize(
    ("path", "stage"),
    [*zip(STAGES, STAGES, strict=True), *((path, STAGES[0]) for path in (STAGE_1, "alone"))],
)
def test_load_trained_model__gives_the_saved_one_to_the_bit(path, stage, run, saved):
    (run / "alone").mkdir()
    shutil.copy(run / STAGE_1, run / "alone")
    trained, expected = load(run / path), saved.outputs[stage]
    found = trained.model(saved.batch)
    assert torch.equal(found.logit, expected.logit)
    assert torch.equal(found.loss, expected.loss)
    assert trained.rules[trained.name] == {"label": RULE}
    assert not trained.model.training
    for place in (run, run / "nowhere"):  # several models, and none
        with pytest.raises(InputError, match=re.escape(str(place))):
            checkpoint_path(place)


def test_load_trained_model__adds_what_training_added(run, saved):
    expected = saved.outputs["classification"]
    logit, offset = expected.logit, expected.offset.squeeze(1)
    halved, alone = {"residual_weight": 0.5}, {"residual_weight": 1, "stage1_logit": False}
    for changes, expected in ((halved, (logit + offset) / 2), (alone, logit - offset)):
        small.rehash(run / BEST, **changes)
        torch.testing.assert_close(load(run / BEST).model(saved.batch).logit, expected)


def test_save_llm__writes_what_was_learned_and_no_patient(saved):
    best, llm = saved.run / BEST, load(saved.run / BEST).model.llm
    files = {path.relative_to(best).as_posix() for path in best.rglob("*") if path.is_file()}
    assert files == {*HASHED, CONFIG, checkpoints.CARD, checkpoints.FACTS, checkpoints.NOTICE}
    learned = {key.split(".")[0] for key in load_file(best / MODULES)}
    assert learned == {"stage1", "projection", "head"}
    assert len(load_file(best / ADAPTER)) == 2 * 7 * 2
    targets = json.loads((best / ADAPTER_CONFIG).read_text())["target_modules"]
    assert targets == sorted(targets), "a set has no order"
    for path in (*(best / name for name in files), saved.run / STAGE_1):
        for mark in (b"patient 0", b"diabetes", bytes(saved.base.parent)):
            assert mark not in path.read_bytes(), path
    options = {"nf4": None, "dtype": torch.float32, "device": small.CPU}
    plain, _ = language_model.load_language_model(str(saved.base), **options)
    with language_model.quiet_libraries():
        adapted = peft.PeftModel.from_pretrained(plain, best / "adapter").eval()
    ids = torch.arange(6, 40)[None]
    assert torch.equal(adapted(input_ids=ids).logits, llm(input_ids=ids).logits)


def test_read_config__ignores_further_files_and_follows_a_hubs_links(run):
    best, expected = run / BEST, read_config(run / BEST)
    for name in (".DS_Store", "adapter/notes.txt", checkpoints.CARD):
        (best / name).write_text("edited by its owner")
    for number, name in enumerate((*HASHED, CONFIG)):  # as in a snapshot of the hub
        (best / name).rename(run / str(number))
        (best / name).symlink_to(os.path.relpath(run / str(number), (best / name).parent))
    assert read_config(best) == expected


# ------------------------------------------------------------------------------- damage


def content_of(run, name):
    """Return all that the checkpoint of a file holds, comparable."""
    if name != STAGE_1:
        return read_config(run / BEST)
    stage1 = read_trajectory(run / name)
    weights = {key: tensor.numpy().tobytes() for key, tensor in stage1.weights.items()}
    return repr(stage1.config), weights, stage1.train_patients.tolist()


@pytest.mark.parametrize("name", [STAGE_1, *(f"{BEST}/{each}" for each in (CONFIG, *HASHED))])
def test_read__names_a_file_that_is_missing_cut_or_changed(name, run):
    path, whole, refusals = run / name, content_of(run, name), 0
    content = path.read_bytes()
    flips = [(content, k * (len(content) - 1) // 23, 1 << k % 8) for k in range(24)]
    turned = [old[:at] + bytes([old[at] ^ bit]) + old[at + 1 :] for old, at, bit in flips]
    for damaged in (None, b"", content[: len(content) // 2], *turned):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        try:
            found = content_of(run, name)
        except InputError as error:
            text, refusals = str(error), refusals + 1
            assert str(run) in text and path.name in text  # noqa: PT018
        else:  # the padding of an archive may be anything
            assert found == whole and damaged in turned  # noqa: PT018
    assert refusals >= 16


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {"config": None},
        lambda _: {"weights": None},
        lambda _: {"weights": {"members.0.head.output.bias": "x"}},
        lambda weights: {"weights": dict(list(weights.items())[1:])},
        lambda weights: {"weights": {**weights, "more": torch.ones(2)}},
        lambda _: {"train_patients": [1, 2]},
    ],
)
def test_load_trained_model__refuses_other_content_of_stage_1(change, run):
    content = torch.load(run / STAGE_1, weights_only=True)
    torch.save({**content, **change(content["weights"])}, run / STAGE_1)
    assert_refused(run / STAGE_1)


@pytest.mark.parametrize("place", [STAGE_1, BEST])
def test_an_earlier_format_is_refused_in_one_line(place, run, tmp_path, capsys):
    content = torch.load(run / STAGE_1, weights_only=True)
    torch.save({**content, "format": 13}, run / STAGE_1)
    small.rehash(run / BEST, format=13)
    words = command(run / place, tmp_path / "rows.csv", tmp_path / "out.csv")
    assert refused(capsys, words, run / place, "format 13", "train again", out=tmp_path / "out.csv")


@pytest.mark.parametrize("name", [MODULES, ADAPTER])
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_load_trained_model__needs_every_key_in_its_shape(name, run):
    weights = load_file(run / BEST / name)
    *kept, lost = sorted(weights)
    harms = [{key: weights[key] for key in kept}, {**weights, "more.lora_A.weight": torch.ones(2)}]
    harms += [{**weights, lost: weights[lost].flatten()[:1].clone()}]
    for harm in harms:
        save_file(harm, run / BEST / name)
        small.rehash(run / BEST)
        assert_refused(run / BEST)


class Code:
    """Runs when it is unpickled."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return Path.touch, (self.ran,)


def test_load_trained_model__runs_no_code(run, tmp_path):
    code, path = Code(tmp_path / "ran"), run / STAGE_1
    content, harm = torch.load(path, weights_only=True), pickle.dumps({"weights": code})
    for name in (MODULES, ADAPTER):
        stage = shutil.copytree(run / "classification", run / name[:7])
        for harmed in (name, "adapter/adapter_model.bin"):
            (stage / "best" / harmed).write_bytes(harm)
        small.rehash(stage / "best")
        assert_refused(stage / "best")
    for key in ("config", "format", "weights"):
        torch.save({**content, key: {**content["config"], "more": code}}, path)
        assert_refused(path)
    path.write_bytes(harm)
    assert_refused(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": 4},
        {"precision": "fp16"},
        {"members": 1},
        {"inputs": {}},
        {"encoder": ENCODER | {"width": 3}},
        {"encoder": ENCODER | {"solver": "x"}},
    ],
    ids=lambda value: repr(value)[:25],
)
def test_load_trained_model__refuses_a_configuration_that_builds_no_model(changes, run):
    small.rehash(run / BEST, **changes)
    assert_refused(run / BEST)


def test_load_trained_model__reads_no_adapter_config(run, saved):
    hostile = {"r": 10**9, "lora_alpha": 10**400, "peft_type": "PREFIX_TUNING", "auto_mapping": {}}
    hostile |= {"base_model_name_or_path": "evil/model", "megatron_core": "evil"}
    small.edit_json(run / BEST / ADAPTER_CONFIG, **hostile, target_modules=["lm_head"])
    small.rehash(run / BEST)
    found = load(run / BEST).model(saved.batch).logit
    assert torch.equal(found, saved.outputs["classification"].logit)


# ------------------------------------------------------------------------------- the base model


def test_check_base__takes_the_same_files_elsewhere_alone(run, saved, tmp_path, caplog):
    moved = shutil.copytree(saved.base, tmp_path / "moved")
    other = small.save_text_checkpoint(tmp_path / "gemma", seed=9)
    found = load(run / BEST, model_name=str(moved)).model(saved.batch).logit
    assert torch.equal(found, saved.outputs["classification"].logit)
    assert not caplog.records
    with pytest.raises(InputError, match=f"--model_name {re.escape(str(other))}"):
        load(run / BEST, model_name=str(other))
    small.edit_json(run / "classification" / "run.json", arguments={"model_name": str(other)})
    with pytest.raises(InputError, match="--model_name"):
        load(run / BEST)
    (run / "classification" / "run.json").unlink()
    assert_refused(run / BEST, "gemma", "--model_name")
    small.rehash(run / BEST, base_model="google/medgemma-4b-pt", base_sha256=None)
    load(run / BEST, model_name=str(moved))  # nothing to compare with
    assert ["google/medgemma-4b-pt" in line for line in caplog.messages] == [True]


@pytest.mark.parametrize("stage", STAGES)
def test_loading_and_predicting__leave_the_process_as_it_was(stage, saved):
    def state():
        exact = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
        verbosity = transformers.logging.get_verbosity()
        return torch.get_rng_state().tolist(), *exact, verbosity, dict(os.environ)

    set_environment()  # the one change that is meant
    _, precision, _, verbosity, _ = state()
    torch.set_float32_matmul_precision("high")
    transformers.logging.set_verbosity_info()
    before = state()
    try:
        load(saved.run / stage)
        assert state() == before
        model = trainer.TrajectoryModel.from_pretrained(saved.run / stage)
        assert state() == before
        model.predict_proba(small.patients())
        assert state() == before
    finally:
        torch.set_float32_matmul_precision(precision)
        transformers.logging.set_verbosity(verbosity)
