"""Launches by accelerate: its file in docs/hardware.md, and ways of sharing that are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
from medgemma_clinical.distributed import SHARDING
from medgemma_clinical.files import InputError

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "medgemma_clinical" / "docs" / "hardware.md"
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Gemma3DecoderLayer
num_machines: 1
num_processes: 2
mixed_precision: "no"
"""


def shown_configuration() -> str:
    """Return the one configuration file that the page shows."""
    blocks = re.findall(r"^```yaml\n(.+?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    text: str = blocks[0]
    return text


def launch(configuration: str, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script by ``accelerate launch`` in two processes."""
    file = place / "ddp.yaml"
    file.write_text(configuration)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["--num_processes", "2", "--main_process_port", "0"]
    command += [str(ROOT / "medgemma_trainer.py"), *words]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=170)


def training(data: Path, output: Path, batch: int) -> list[str]:
    words = ["--trajectory_only", "--trajectory_epochs", "2", "--data_path", str(data)]
    words += ["--batch_size", str(batch), "--output_dir", str(output)]
    return [*words, "--min_cell", "0", "--log_file", "none"]


def test_the_file_of_the_page_trains_as_one_process_does(dka_file: Path, tmp_path: Path) -> None:
    assert trainer.main(training(dka_file, tmp_path / "one", 8)) == 0
    done = launch(shown_configuration(), tmp_path, *training(dka_file, tmp_path / "two", 4))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("epoch 1/") == 1, "one of several processes speaks"
    one, two = (tmp_path / name / "trajectory" for name in ("one", "two"))
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    for part in ("val", "test"):
        tables = [pd.read_csv(folder / f"predictions_{part}.csv") for folder in (one, two)]
        assert tables[0]["id"].equals(tables[1]["id"])
        np.testing.assert_allclose(tables[0]["probability"], tables[1]["probability"], atol=2e-5)
    alone, shared = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
    for part in ("validation", "test"):
        figures = {k: v for k, v in alone[part].items() if isinstance(v, dict) and "value" in v}
        assert {"auroc", "brier"} <= figures.keys()
        for name, figure in figures.items():
            found = shared[part][name]["value"]
            assert found == pytest.approx(figure["value"], abs=1e-4, nan_ok=True), name


def test_a_launch_that_asks_for_fsdp_ends_with_one_line(dka_file: Path, tmp_path: Path) -> None:
    done = launch(FSDP, tmp_path, *training(dka_file, tmp_path / "run", 4))
    assert done.returncode != 0
    errors = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1, done.stderr[-2000:]
    assert "accelerate's configuration asks for FSDP" in errors.pop()
    assert 'medgemma_trainer.py", line' not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("variable", "way"), SHARDING.items())
@pytest.mark.parametrize("words", ["--demo", "--trajectory_only", "--predict", "--compare x"])
def test_every_command_refuses_to_cut_a_model(
    words: str,
    variable: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, "true")
    more = ["--checkpoint", "x", "--predictions", "y.csv", "--data_path", "z.csv"]
    assert trainer.main([*words.split(), *(more if words == "--predict" else [])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"asks for {way}, and each process" in error
    assert "distributed_type: MULTI_GPU" in error


def test_what_accelerate_sets_for_other_ways_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trainer.check_launch()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    with pytest.raises(InputError):
        trainer.check_launch()
    with pytest.raises(InputError, match="asks for FSDP"):
        trainer.fit_trajectory("no_such_file.csv")
