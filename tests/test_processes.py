"""Two processes: they do what one does alone, the first one writes, and none outlives the other."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from faults import result_of

import medgemma_trainer as trainer
from conftest import sign_table
from language_models import TINY_MODEL
from medgemma_clinical import distributed
from medgemma_clinical.inference import generation
from medgemma_clinical.models.trajectory_llm import LLMWriter
from medgemma_clinical.provenance import ROOT

pytestmark = pytest.mark.slow

SHARED = f"--model_name {TINY_MODEL} --epochs 2 --log_file none"
DROPPED = f"{SHARED} --mode classification --batch_size 4 --lora_dropout 0.3 --save_every 1"
WATCHED = f"{SHARED} --mode generative --lora_dropout 0 --gradient_accumulation 4 --members 2"
WATCHED += " --dropout 0"
STAGE_1 = "--trajectory_only --trajectory_epochs 2 --members 2 --dropout 0 --log_file none"


def watch(folder, patch):
    """Keep the first step's gradients; the third pass of the last process has a loss of NaN."""
    clip, forward, trained = trainer.clip_grad_norm_, LLMWriter.forward, []
    rank, processes = (int(os.environ.get(k, n)) for k, n in (("RANK", 0), ("WORLD_SIZE", 1)))

    def keep(parameters, norm):
        path = Path(folder, f"{processes}.pt")
        if rank == 0 and not path.exists():
            torch.save([p.grad for p in parameters], path)
        return clip(parameters, norm)

    def fail(model, batch):
        output = forward(model, batch)
        trained.append(model.training)
        bad = rank == processes - 1 and model.training and sum(trained) == 3
        return output._replace(loss=output.loss + float("nan")) if bad else output

    patch.setattr(trainer, "clip_grad_norm_", keep)
    patch.setattr(LLMWriter, "forward", fail)
    patch.setattr(generation, "CPU_ROWS", 3)  # reports come from both processes


def die(patch):
    """Kill the process that writes, in the second epoch."""
    step = trainer.step

    def killed(state, *rest):
        if state.progress.steps == 7 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(state, *rest)

    patch.setattr(trainer, "step", killed)


def fork(folder, *runs, prepare=lambda patch: None, launched=({}, {})):
    """Do runs one after the other in two processes; return codes and errors.

    ``launched``: what a launcher sets for each beside its number and the place to meet.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children, paths = [], [folder / f"{rank}.txt" for rank in range(2)]
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            codes = [99]
            try:
                own = {"RANK": str(rank), "WORLD_SIZE": "2"}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                own["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # the launcher has ended
                os.environ |= {"LOCAL_RANK": str(rank), **launched[rank], **own}
                sys.stderr = paths[rank].open("w", buffering=1)
                AcceleratorState._reset_state(reset_partial_state=True)
                distributed.processes.cache_clear()
                prepare(pytest.MonkeyPatch())
                codes = [trainer.main(words) for words in runs]
            finally:
                os._exit(max(codes))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes, [path.read_text() for path in paths]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What accelerate, launched as the docs say, sets in the environment of two processes."""
    folder = tmp_path_factory.mktemp("launched")
    page = (ROOT / "medgemma_clinical" / "docs" / "training.md").read_text()
    (shown,) = re.findall(r"^```yaml\n(.+?)^```", page, re.MULTILINE | re.DOTALL)
    (folder / "ddp.yaml").write_text(shown)
    code = "import json, os; open(os.environ['RANK'], 'w').write(json.dumps({**os.environ}))"
    (folder / "program.py").write_text(code)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "ddp.yaml"]
    command += ["--num_processes", "2", "--main_process_port", "0", "program.py"]
    # A precision in accelerate's own configuration must not change the model's.
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16"}
    subprocess.run(command, cwd=folder, check=True, env=environment, capture_output=True)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data, and how a run of it begins."""
    folder = tmp_path_factory.mktemp("processes")
    table = sign_table(54, seed=3).assign(split=["train"] * 37 + ["val"] * 9 + ["test"] * 8)
    table.to_csv(folder / "data.csv", index=False)
    return folder


def words_for(place, name, flags):
    return f"{flags} --data_path {place}/data.csv --output_dir {place}/{name}".split()


def assert_same_results(one, two, *more):
    """Compare the results of two stages to rounding."""
    for name in ("predictions_val.csv", "predictions_test.csv"):
        tables = (pd.read_csv(folder / name) for folder in (two, one))
        # The hash of weights is another one where these differ by rounding.
        tables = (table.drop(columns="model_sha256") for table in tables)
        pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=2e-5)
    for name in ("history.jsonl", *more):
        tables = [pd.read_json(folder / name, lines=True) for folder in (two, one)]
        tables = [table.drop(columns="seconds", errors="ignore") for table in tables]
        pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=2e-5)


def test_a_run_of_which_a_process_died_resumes_to_the_same_result(place):
    """Each process goes on with the random numbers of its own."""
    broken, whole = (words_for(place, name, DROPPED) for name in ("broken", "whole"))
    codes, errors = fork(place, broken, prepare=die)
    assert codes == [-signal.SIGKILL, 3]
    assert errors[1].count("\n") == errors[1].count("error: ") == 1, errors[1]
    assert fork(place, [*broken, "--resume"], whole)[0] == [0, 0]
    one, two = (result_of(place / name, "classification") for name in ("broken", "whole"))
    assert one == two


def test_two_processes_equal_one(place, launched, monkeypatch, capfd):
    """They skip the step together of which one has no loss."""
    for rank, environment in enumerate(launched):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        assert own.items() <= environment.items()
    of_accelerate = [{k: x for k, x in each.items() if "ACCELERATE" in k} for each in launched]
    words = words_for(place, "2", f"{WATCHED} --batch_size 2")
    prepare = partial(watch, place)
    assert fork(place, words, prepare=prepare, launched=of_accelerate)[0] == [0, 0]
    assert capfd.readouterr().out.count("epoch 1/") == 1, "one of several processes speaks"
    watch(place, monkeypatch)
    assert trainer.main(words_for(place, "1", f"{WATCHED} --batch_size 4")) == 0
    one, two = (torch.load(place / f"{k}.pt") for k in (1, 2))
    assert any(gradient.abs().max() > 1e-3 for gradient in one)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    one, two = (place / f"{k}" / "generative" for k in (1, 2))
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    assert_same_results(one, two, "generations_test.jsonl")
    assert pd.read_json(two / "history.jsonl", lines=True)["skipped_steps"].sum() == 1


def test_processes_of_two_machines_equal_one_in_stage_1(place):
    """Each row is read up to the same earlier observation, whichever process reads it."""
    words = words_for(place, "pair", f"{STAGE_1} --batch_size 4")
    first_of_each = {"LOCAL_RANK": "0"}  # as torchrun says on each machine
    assert fork(place, words, launched=(first_of_each, first_of_each))[0] == [0, 0]
    assert trainer.main(words_for(place, "single", f"{STAGE_1} --batch_size 8")) == 0
    assert_same_results(*(place / name / "trajectory" for name in ("single", "pair")))


def test_a_worker_ends_when_its_parent_is_killed():
    """As the kernel kills a process that takes too much memory."""
    child = "import time; from medgemma_clinical.training import signals; "
    child += "signals.begin_process('json'); print('begun', flush=True); time.sleep(600)"
    code = "import subprocess, sys; worker = subprocess.Popen([sys.executable, '-c', sys.argv[1]], "
    code += "stdout=subprocess.PIPE); worker.stdout.readline(); print(worker.pid, flush=True); "
    command = [sys.executable, "-c", f"{code}worker.wait()", child]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 60
    while _lives(worker) and time.monotonic() < end:
        time.sleep(0.1)
    has_ended = not _lives(worker)
    if not has_ended:
        os.kill(worker, signal.SIGKILL)
    assert has_ended


def _lives(pid):
    status = Path(f"/proc/{pid}/stat")  # of a zombie Z, which nobody has waited for
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
