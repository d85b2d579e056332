"""Stop runs in every way, resume them, and compare with the undisturbed run.

Usage:
    python tests/faults.py --trials 100            # each of the three stages, each kind of fault

A run is a forked process of its own. It is killed at a random time or at one of its writes (counted
by an audit hook: every opening for writing, renaming, removing, making of a folder; and every wait
for the disk, where a full disk may show itself last), loses the disk or the right to write there,
gets signals, or finds a file damaged when it resumes. Or two processes share a run and one of them
is killed: the other must end within a minute and say why in one line. Afterwards ``--resume`` must
lead to the weights, history, metrics and predictions of the undisturbed run, to the last bit, or
refuse in one line; the table counts which. Exit code 1 where one trial did neither.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pandas as pd  # noqa: E402  (the threads are told before)
import torch  # noqa: E402

import medgemma_trainer as trainer  # noqa: E402
from medgemma_clinical.commands.run_folder import state_store  # noqa: E402
from medgemma_clinical.evaluation import bootstrap  # noqa: E402
from medgemma_clinical.files import PARTIAL, REPLACED  # noqa: E402
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE  # noqa: E402

SAMPLE = ROOT / "tests" / "data" / "physionet2012_bicarbonate.csv"
SHARED = ["--min_cell", "0", "--log_file", "none", "--save_every", "3", "--patience", "2"]
STAGES = {
    "trajectory": ["--trajectory_only", "--trajectory_epochs", "4"],
    "classification": ["--mode", "classification", "--model_name", "tiny", "--epochs", "2"],
    "generative": ["--mode", "generative", "--model_name", "tiny", "--epochs", "2"],
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
LONGEST = 300.0
"""Seconds after which a run counts as hanging."""

SHARED_END = 60.0
"""Seconds within which a process must end when another of its run was killed."""

AtWrite = Callable[[int], None]
"""What happens before a run's k-th write, counted from 1."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code, or minus the signal; what it printed to stderr."""

    code: int
    error: str


def watch_writes(folder: Path, at_write: AtWrite) -> None:
    """Call ``at_write`` before every write beneath ``folder`` of this process."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(path, (str, bytes, os.PathLike)) and flags & WRITING
        else:
            path, writes = arguments[0] if arguments else "", event in CHANGES
        if writes and str(path).startswith(str(folder)):
            count += 1
            at_write(count)

    fsync = os.fsync

    def counted(descriptor: Any) -> None:
        hook("os.rename", (folder,))  # counts as a change of what lies there
        fsync(descriptor)

    sys.addaudithook(hook)
    setattr(os, "fsync", counted)  # noqa: B010  (a typed module takes no other function)


def start(words: list[str], folder: Path, at_write: AtWrite | None = None) -> int:
    """Fork a process that runs the trainer; return its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        for stream, name in ((1, "out"), (2, "err")):
            target = os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(target, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        bootstrap.REPLICATES = 20  # the figures need not be good, only the same
        if at_write:
            watch_writes(folder, at_write)
        code = trainer.main(words)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 99
    except BaseException as error:
        os.write(2, f"traceback: {error!r}\n".encode())
    finally:
        os._exit(code)


def wait(child: int, folder: Path) -> Ended:
    """Wait for a run to end; kill one that hangs."""
    until = time.monotonic() + LONGEST
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Ended(99, "hangs")
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, (folder.parent / "err").read_text(encoding="utf-8", errors="replace"))


PROGRAM = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import medgemma_trainer as trainer
from medgemma_clinical.evaluation import bootstrap
bootstrap.REPLICATES = 20  # the figures need not be good, only the same
pathlib.Path({place!r}, "pid." + os.environ.get("RANK", "0")).write_text(str(os.getpid()))
{before}
sys.exit(trainer.program())
"""


def launch(
    processes: int, words: list[str], place: Path, before: str = ""
) -> subprocess.Popen[str]:
    """Start the program in so many processes; the number of each lies in ``place/pid.RANK``.

    Args:
        processes: that share the run.
        words: of the command line.
        place: of what is needed beside it.
        before: Python that each runs first.
    """
    program = place / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), place=str(place), before=before))
    command = [sys.executable, str(program), *words]
    if processes > 1:
        # What accelerate launch does for several GPUs; for CPUs it would need mpirun.
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command = [sys.executable, *start, str(processes), str(program), *words]
    # A precision in accelerate's own configuration must not change the model's.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    )


def result_of(folder: Path, stage: str) -> dict[str, bytes]:
    """Return all of a run's result that must be the same: everything but times."""
    place = folder / stage
    result = {}
    best = [folder / TRAJECTORY_FILE] if stage == "trajectory" else []
    best += sorted(p for p in (place / "best").rglob("*") if p.is_file())
    names = ["metrics.json", "predictions_val.csv", "predictions_test.csv"]
    names += ["generations_test.jsonl"] if stage == "generative" else []
    for path in (*best, *(place / name for name in names)):
        result[str(path.relative_to(folder))] = path.read_bytes()
    history = [json.loads(x) for x in (place / "history.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in row.items() if k != "seconds"} for row in history]
    result["history"] = json.dumps(plain).encode()
    return result


# --------------------------------------------------------------------------- faults


def die_at(number: int) -> AtWrite:
    def at_write(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return at_write


def fail_from(number: int, code: int, length: int) -> AtWrite:
    """Let so many writes fail with an error of the system; the disk has room again after them."""

    def at_write(count: int) -> None:
        if number <= count < number + length:
            raise OSError(code, os.strerror(code))

    return at_write


def signals_at(number: int, kinds: list[int]) -> AtWrite:
    def at_write(count: int) -> None:
        if count == number:
            for kind in kinds:
                os.kill(os.getpid(), kind)

    return at_write


def damage(path: Path, draw: random.Random) -> None:
    """Cut a file short, or turn one of its bits."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5 or not content:
        del content[draw.randrange(len(content) + 1) :]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@dataclass(frozen=True)
class Trial:
    """One stage's command, its undisturbed result, writes (of one process) and seconds."""

    stage: str
    words: list[str]
    result: dict[str, bytes]
    writes: int
    seconds: float


def undisturbed(stage: str, words: list[str], place: Path) -> Trial:
    """Run a command without a fault."""
    folder, counts = place / "run", place / "count"

    def count(number: int) -> None:
        descriptor = os.open(counts, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(descriptor, str(number).encode())
        os.close(descriptor)

    place.mkdir()
    began = time.monotonic()
    ended = wait(start([*words, "--output_dir", str(folder)], folder, count), folder)
    if ended.code:
        raise SystemExit(f"the undisturbed run ended with {ended}")
    seconds = time.monotonic() - began
    return Trial(stage, words, result_of(folder, stage), int(counts.read_text()), seconds)


def undisturbed_pair(stage: str, words: list[str], place: Path) -> Trial:
    """Run a command in two processes without a fault."""
    place.mkdir()
    folder = place / "run"
    began = time.monotonic()
    ended = wait_for_pair([*words, "--output_dir", str(folder)], place)
    if ended.code:
        raise SystemExit(f"the undisturbed run of two processes ended with {ended}")
    return Trial(stage, words, result_of(folder, stage), 0, time.monotonic() - began)


def wait_for_pair(words: list[str], place: Path, kill: tuple[int, float] | None = None) -> Ended:
    """Run a command in two processes; kill one of them (which, after how many seconds)."""
    pair = launch(2, words, place)
    longest = LONGEST
    if kill:
        rank, seconds = kill
        time.sleep(seconds)
        longest = SHARED_END
        number = place / f"pid.{rank}"
        while not number.is_file() or not number.read_text():
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):  # it may have ended
            os.kill(int(number.read_text()), signal.SIGKILL)
    try:
        error = pair.communicate(timeout=longest)[1]
    except subprocess.TimeoutExpired:
        os.killpg(pair.pid, signal.SIGKILL)
        return Ended(99, "hangs")
    return Ended(pair.returncode, error)


def judge_pair(trial: Trial, place: Path, draw: random.Random) -> str:
    """Kill one of two processes, resume with two, and return the outcome."""
    place.mkdir()
    words = [*trial.words, "--output_dir", str(place / "run")]
    kill = draw.randrange(2), draw.uniform(0, trial.seconds)
    ended = wait_for_pair(words, place, kill)
    begun = has_checkpoints(place / "run" / trial.stage)
    told = [line for line in ended.error.splitlines() if line.startswith("error: ")]
    # The launcher asks the other to end, if that has not seen by itself that it is alone.
    known = ("another process of this run has ended", "interrupted")
    if ended.error == "hangs" or not all(any(k in line for k in known) for line in told):
        return f"wrong: killed {kill}: {ended}"
    if f'File "{ROOT}/medgemma_' in ended.error:
        return f"wrong: killed {kill}: a traceback: {ended}"
    if begun and ended.code and not told:
        return f"wrong: killed {kill}: the other says nothing: {ended}"
    again, outcome = wait_for_pair([*words, "--resume"], place), "the same result"
    if again.code and "no run was begun" in again.error and not begun:
        again, outcome = wait_for_pair(words, place), "never began"
    if again.code:
        return f"wrong: killed {kill}: resuming ended with {again}"
    same = result_of(place / "run", trial.stage) == trial.result
    return outcome if same else f"wrong: killed {kill}: another result"


def has_checkpoints(folder: Path) -> bool:
    """Return whether a run has kept a checkpoint that it can resume from."""
    return bool(state_store(folder).files())


def is_read(path: Path) -> bool:
    """Return whether resuming reads a file: facts, checkpoints, best; a result is only written."""
    known = path.name in ("run.json", TRAJECTORY_FILE)
    return known or path.parent.name == "last" or "best" in path.parts


def disturb(trial: Trial, kind: str, folder: Path, draw: random.Random) -> Ended:
    """Run a command with one fault."""
    words = [*trial.words, "--output_dir", str(folder)]
    place = draw.randint(1, trial.writes)
    at_write = {
        "killed at a write": die_at(place),
        "disk full": fail_from(place, errno.ENOSPC, draw.choice([1, 3, 10**9])),
        "no permission": fail_from(place, errno.EACCES, draw.choice([1, 3, 10**9])),
        "SIGTERM": signals_at(place, [signal.SIGTERM]),
        "SIGINT twice": signals_at(place, [signal.SIGINT, signal.SIGINT]),
        "file damaged": die_at(place),
    }.get(kind)
    child = start(words, folder, at_write)
    if at_write is None:  # at any time
        time.sleep(draw.uniform(0, trial.seconds))
        os.kill(child, signal.SIGKILL)
    ended = wait(child, folder)
    if kind == "file damaged":
        files = [p for p in folder.rglob("*") if p.is_file() and is_read(p)]
        checkpoints = [p for p in files if p.parent.name == "last"]
        if files:
            often = checkpoints or files
            damage(draw.choice(often if draw.random() < 0.7 else files), draw)
    return ended


def judge(trial: Trial, kind: str, place: Path, draw: random.Random) -> str:
    """Disturb a run, resume it, and return the outcome; ``wrong: ...`` for a defect."""
    folder = place / "run"
    place.mkdir()
    ended = disturb(trial, kind, folder, draw)
    begun = has_checkpoints(folder / trial.stage)
    words = [*trial.words, "--output_dir", str(folder)]
    expected = {
        "SIGTERM": {143},
        "SIGINT twice": {-signal.SIGINT, 130},
        "killed at a write": {-signal.SIGKILL},
        "file damaged": {-signal.SIGKILL},
    }.get(kind, {0, 2, 3, -signal.SIGKILL})
    if ended.code not in expected or "traceback" in ended.error.lower():
        return f"wrong: ended with {ended}"
    again = wait(start([*words, "--resume"], folder), folder)
    outcome = "the same result"
    if again.code == 2 and again.error.count("\n") == 1:
        # It never began, or a file is damaged: as a user would, start again.
        outcome = "never began" if "no run was begun" in again.error else "refused in one line"
        if outcome == "never began" and begun:
            return f"wrong: checkpoints are there, and yet: {again.error}"
        if outcome == "refused in one line" and kind != "file damaged":
            return f"wrong: refused: {again.error}"
        again = wait(start(words, folder), folder)
    if again.code:
        return f"wrong: resuming ended with {again}"
    if result_of(folder, trial.stage) != trial.result:
        return "wrong: another result"
    left = [str(p) for p in folder.rglob(".*") if p.suffix in (PARTIAL, REPLACED)]
    return f"wrong: left {left}" if left else outcome


KINDS = (
    "killed at a write",
    "killed at any time",
    "disk full",
    "no permission",
    "SIGTERM",
    "SIGINT twice",
    "file damaged",
    "one of two killed",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=100, help="of each stage and kind of fault")
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        data = base / "patients.csv"
        pd.read_csv(SAMPLE, nrows=90).to_csv(data, index=False)
        shutil.copy(SAMPLE.with_suffix(".json"), data.with_suffix(".json"))
        for stage in args.stages:
            words = [*STAGES[stage], "--data_path", str(data), *SHARED]
            alone = undisturbed(stage, words, base / stage)
            for kind in args.kinds:
                pair = kind == "one of two killed"
                trial = undisturbed_pair(stage, words, base / f"{stage}-2") if pair else alone
                outcomes: Counter[str] = Counter()
                for k in range(args.trials):
                    place = base / f"{stage}-{kind}-{k}".replace(" ", "_")
                    outcome = (
                        judge_pair(trial, place, draw) if pair else judge(trial, kind, place, draw)
                    )
                    outcomes[outcome.partition(":")[0]] += 1
                    if outcome.startswith("wrong"):
                        failures.append(f"{stage}, {kind}, trial {k}: {outcome}")
                        sys.stdout.write(failures[-1] + "\n")
                    shutil.rmtree(place)
                rows.append({"stage": stage, "fault": kind, "trials": args.trials, **outcomes})
                sys.stdout.write(f"{rows[-1]}\n")
                sys.stdout.flush()
    table = pd.DataFrame(rows)
    counts = table.columns[2:]
    table[counts] = table[counts].fillna(0).astype(int)
    sys.stdout.write(f"\n{table.to_string(index=False)}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
