"""Flags of the language model, whole program: a model of the hub, attention, refused weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

import medgemma_trainer as trainer
from conftest import SAMPLE
from language_models import COMMIT, PUBLISHED, put_into_cache, save_published
from predicting import command, predicted, refused, write_data

MODEL = PUBLISHED[1]
SHORT = ["--mode", "classification", "--epochs", "1", "--batch_size", "8", "--log_file", "none"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs with each attention on a model of the hub's cache, named by its hub id."""
    place = tmp_path_factory.mktemp("hub")
    put_into_cache(place / "cache", MODEL.name, save_published(place / "model", MODEL))
    data = write_data(pd.read_csv(SAMPLE, nrows=60, dtype=str), place / "train.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "cache"))
        for attention in ("sdpa", "eager"):
            words = ["--data_path", str(data), "--output_dir", str(place / attention), *SHORT]
            words += ["--model_name", MODEL.name, "--attention", attention]
            assert trainer.main(words) == 0
        yield place


def stage_of(place: Path, attention: str) -> Path:
    return place / attention / "classification"


def config_of(place: Path, attention: str) -> dict[str, Any]:
    """Return what the best model says of itself, without hashes and what learning chooses."""
    config = json.loads((stage_of(place, attention) / "best" / "config.json").read_text())
    chosen = {"decision", "residual_weight", "files_sha256", "config_sha256"}
    return {key: value for key, value in config.items() if key not in chosen}


def test_a_checkpoint_holds_the_same_whatever_the_attention(place: Path) -> None:
    config = config_of(place, "eager")
    assert config == config_of(place, "sdpa")
    assert (config["base_model"], config["base_revision"]) == (MODEL.name, COMMIT)
    assert "eager" not in json.dumps(config)
    for name in ("modules.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(stage_of(place, a) / "best" / name) for a in ("sdpa", "eager"))
        assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    adapter = "adapter/adapter_config.json"
    texts = [(stage_of(place, a) / "best" / adapter).read_text() for a in ("sdpa", "eager")]
    assert texts[0] == texts[1]
    run = json.loads((stage_of(place, "eager") / "run.json").read_text())
    assert run["arguments"]["attention"] == "eager"


def test_predictions_take_the_attention_and_agree(place: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(place / "train.csv", dtype=str).drop(columns="label_escalation")
    data, stage = write_data(rows, tmp_path / "new.csv"), stage_of(place, "sdpa")
    fused = predicted(stage, data, tmp_path / "fused.csv")
    plain = predicted(stage, data, tmp_path / "plain.csv", "--attention", "eager")
    np.testing.assert_allclose(plain["probability"], fused["probability"], atol=1e-4)


def test_a_run_is_not_resumed_with_another_attention(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data_path", str(place / "train.csv"), "--output_dir", str(place / "sdpa"), *SHORT]
    words += ["--model_name", MODEL.name, "--attention", "eager", "--resume"]
    assert refused(capsys, words, "--attention was sdpa, is eager")


@pytest.mark.parametrize("predicts", [False, True])
def test_flash_attention_on_a_cpu_is_one_line(
    predicts: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = place / "train.csv", tmp_path / "out.csv"
    words = ["--data_path", str(data), "--output_dir", str(tmp_path / "run"), *SHORT]
    words += ["--model_name", "tiny"]
    if predicts:
        words = command(stage_of(place, "sdpa"), data, out)
    words += ["--attention", "flash_attention_2"]
    assert refused(capsys, words, "--attention flash_attention_2 needs an NVIDIA GPU", out=out)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", ["--model_name tiny", "--predict --checkpoint x"])
def test_int8_is_refused_with_its_reason(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        trainer.main([*words.split(), "--quantization", "int8"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for reason in ("--quantization: int8 is known", "issue 5", "float16", "use nf4"):
        assert reason in error
