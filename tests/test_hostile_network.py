"""No stage opens a connection or asks for a name; a run sends nothing about the user."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SAMPLE
from language_models import save_text_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

GUARDED = """
import os, re, socket, sys, time

def guard(place, name):
    def refuse(*arguments, **_):
        seen.append((name, arguments))
        raise OSError(101, "guarded")
    setattr(place, name, refuse)

seen = []
for name in ("connect", "connect_ex", "sendto"):
    guard(socket.socket, name)
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    guard(socket, name)

class Watch:
    def find_spec(self, name, *_):
        if name == "bitsandbytes":  # starts CUDA, which reads it once
            allocators.add(os.environ.get("PYTORCH_ALLOC_CONF"))
        if name == "kernels":  # fetches code that is then run
            seen.append(name)

allocators = set()
sys.meta_path.insert(0, Watch())
before = {*os.environ}
import huggingface_hub.constants
import torch
import medgemma_trainer as trainer

own = " ".join({*os.environ} - before)
assert not re.search("TELEMETRY|TRACK|HF_|WANDB|MLFLOW|CUBLAS", own), own
assert not huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, "an import is not a run"
assert not allocators, "stage 1 needs no bitsandbytes"

from matplotlib.figure import Figure
from medgemma_clinical.evaluation import metrics

torch.set_num_threads(1)
metrics.REPLICATES = 20
Figure.savefig = lambda *_, **__: None
data, model, run = sys.argv[1:]
shared = ["--data_path", data, "--output_dir", run, "--max_samples", "60", "--batch_size", "8"]
text = [*shared, "--model_name", model, "--epochs", "1", "--ode_checkpoint"]
text += [f"{run}/medgemma_trajectory_best.pt"]
score = ["predict", "--data_path", data, "--predictions"]
for words in (
    [*shared, "--trajectory_only", "--trajectory_epochs", "1"],
    [*text, "--mode", "classification"],
    [*text, "--mode", "generative"],
    [*score, f"{run}/out.csv", "--checkpoint", f"{run}/classification"],
    ["export", "merged", "--checkpoint", f"{run}/generative", "--out", f"{run}/served"],
):
    assert trainer.main(words) == 0, words
print("attempts:", seen)
assert allocators == {"expandable_segments:True"}, allocators

time.sleep = lambda _: None  # no waiting
for words in (["--trajectory_only", "--data_path", "no.csv"], ["--data_path", data]):
    assert trainer.main(words) == 2, words
assert seen, "the gated model was asked for"
assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
"""


def test_all_stages_prediction_and_export_use_no_network(tmp_path):
    """After them a picture that is no table, and the gated model at a hub that is not reached."""
    (tmp_path / "no.csv").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    model = save_text_checkpoint(tmp_path / "model")
    data = tmp_path / "data.csv"
    data.write_bytes(b"".join(SAMPLE.read_bytes().splitlines(keepends=True)[:151]))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "cache")}
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    words = [str(path) for path in (data, model, tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [s for s in done.stdout.splitlines() if s.startswith("attempts")] == ["attempts: []"]
    first, second = done.stderr.splitlines()[-2:]
    assert "no.csv" in first
    assert "--model_name" in second
    assert "127.0.0.1" not in done.stdout
    assert not list(tmp_path.glob("checkpoints*"))
