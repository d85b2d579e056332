"""Stop runs in every way, resume them, and compare with the undisturbed run.

Usage:
    python tests/benchmarks/faults.py --trials 100  # each of the three stages, each kind of fault

A run is a forked process of its own. It is killed at a random time or at one of its writes (counted
by an audit hook, waits for the disk included), loses the disk, or gets signals. Afterwards
``--resume`` must lead to the result of the undisturbed run, to the last bit; where no state was
kept it must refuse in one line. Exit code 1 where one trial did neither.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]

import pandas as pd  # noqa: E402  (the threads are set before)
import torch  # noqa: E402

import medgemma_trainer as trainer  # noqa: E402
from language_models import TINY_MODEL  # noqa: E402
from medgemma_clinical.commands.run_folder import state_folder  # noqa: E402
from medgemma_clinical.files import PARTIAL, REPLACED  # noqa: E402
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE  # noqa: E402
from medgemma_clinical.training.state import has_state  # noqa: E402

SAMPLE = ROOT / "medgemma_clinical" / "sample" / "physionet2012_bicarbonate.csv"
SHARED = "--min_cell 0 --log_file none --save_every 3 --patience 2"
STAGES = {
    "trajectory": "--trajectory_only --trajectory_epochs 4",
    "classification": f"--mode classification --model_name {TINY_MODEL} --epochs 2",
    "generative": f"--mode generative --model_name {TINY_MODEL} --epochs 2",
}
KINDS = ("killed at a write", "killed at any time", "disk full", "signals")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def result_of(folder, stage):
    """Return all of a run's result that must be the same: everything but times."""
    place = folder / stage
    names = ["metrics.json", "predictions_val.csv", "predictions_test.csv"]
    paths = [place / name for name in (*names, "generations_test.jsonl")]
    paths += [folder / TRAJECTORY_FILE] if stage == "trajectory" else (place / "best").rglob("*")
    result = {path.relative_to(folder): path.read_bytes() for path in paths if path.is_file()}
    history = pd.read_json(place / "history.jsonl", lines=True, precise_float=True)
    result["history"] = history.drop(columns="seconds").to_json(double_precision=15)
    assert len(result) >= 5, "weights, three files, history"
    return result


def watch_writes(folder, at_write):
    """Call ``at_write(k)`` before the k-th write beneath ``folder`` of this process."""
    count, fsync = 0, os.fsync

    def hook(event, arguments):
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(path, (str, bytes, os.PathLike)) and flags & WRITING
        else:
            path, writes = arguments[0] if arguments else "", event in CHANGES
        if writes and str(path).startswith(str(folder)):
            count += 1
            at_write(count)

    def counted(descriptor):  # a full disk may show itself here at last
        hook("os.rename", (folder,))
        fsync(descriptor)

    sys.addaudithook(hook)
    os.fsync = counted


def start(words, folder, at_write=lambda count: None):
    """Fork a process that runs the trainer; return its number."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 99
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        target = os.open(folder.parent / "err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(target, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        watch_writes(folder, at_write)
        code = trainer.main([*words, "--output_dir", str(folder)])
    except BaseException as error:
        os.write(2, f"traceback: {error!r}\n".encode())
    finally:
        os._exit(code)


def wait(child, folder):
    """Wait for a run to end; return its exit code, or minus its signal, and its errors."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, (folder.parent / "err").read_text(errors="replace")


def disturb(kind, words, folder, writes, seconds, draw):
    """Run a command with one fault; return how it ended."""
    number, length = draw.randint(1, writes), draw.choice([1, 3, 10**9])
    sent = draw.choice([[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])

    def at_write(count):
        if kind == "killed at a write" and count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "disk full" and number <= count < number + length:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for each in sent if kind == "signals" and count == number else ():
            os.kill(os.getpid(), each)

    child = start(words, folder, at_write)
    if kind == "killed at any time":
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
    return wait(child, folder)


def judge(kind, stage, words, folder, expected, size, draw):
    """Disturb a run, resume it, and return the outcome; ``wrong: ...`` for a defect."""
    code, error = disturb(kind, words, folder, *size, draw)
    expected_codes = {"disk full": {0, 2, 3}, "signals": {143, 130, -signal.SIGINT}}
    if code not in expected_codes.get(kind, {0, -signal.SIGKILL}) or "raceback" in error:
        return f"wrong: ended with {code}: {error}"
    begun, outcome = has_state(state_folder(folder / stage)), "the same result"
    code, error = wait(start([*words, "--resume"], folder), folder)
    if (code, begun, error.count("\n")) == (2, False, 1):  # as a user would, start again
        outcome = "never began"
        code, error = wait(start(words, folder), folder)
    if code:
        return f"wrong: resuming ended with {code}: {error}"
    if result_of(folder, stage) != expected:
        return "wrong: another result"
    left = [str(p) for p in folder.rglob(".*") if p.suffix in (PARTIAL, REPLACED)]
    return f"wrong: left {left}" if left else outcome


def undisturbed(stage, words, folder):
    """Run a command without a fault; return its result, and its writes and seconds."""
    folder.parent.mkdir()
    counts, began = folder.parent / "count", time.monotonic()
    code, error = wait(start(words, folder, lambda k: counts.write_text(str(k))), folder)
    if code:
        raise SystemExit(f"the undisturbed run ended with {code}: {error}")
    seconds = time.monotonic() - began
    return result_of(folder, stage), (int(counts.read_text()), seconds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=100, help="of each stage and kind of fault")
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    draw, failed = random.Random(args.seed), False
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        pd.read_csv(SAMPLE, nrows=90).to_csv(base / "data.csv", index=False)
        for stage in args.stages:
            words = f"{STAGES[stage]} --data_path {base / 'data.csv'} {SHARED}".split()
            expected, size = undisturbed(stage, words, base / stage / "run")
            for kind in args.kinds:
                outcomes = Counter()
                for _ in range(args.trials):
                    folder = base / "trial" / "run"
                    folder.parent.mkdir()
                    outcome = judge(kind, stage, words, folder, expected, size, draw)
                    shutil.rmtree(folder.parent)
                    outcomes[outcome] += 1
                    failed |= outcome.startswith("wrong")
                sys.stdout.write(f"{stage}, {kind}: {json.dumps(outcomes)}\n")
                sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
