"""The folder of a stage's run: begun, resumed, finished; an earlier result is moved aside."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from medgemma_clinical.commands.command_line import EXIT_DONE, EXIT_INTERRUPTED
from medgemma_clinical.commands.logs import RUN_LOG, check_log_file
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.training_data import Data, prepare_data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import default_device, peak_mib, processes
from medgemma_clinical.files import (
    InputError,
    clean,
    file_hash,
    json_hash,
    locked,
    names_aside,
    partial_path,
    read_json,
    remove,
    write_json,
    write_text,
)
from medgemma_clinical.models.checkpoints import (
    TRAJECTORY_FILE,
    TrajectoryCheckpoint,
    read_trajectory,
)
from medgemma_clinical.models.language_model import base_facts
from medgemma_clinical.provenance import code_hash, git_commit, versions
from medgemma_clinical.training.signals import SIGNALS
from medgemma_clinical.training.state import StateStore
from medgemma_clinical.training.trackers import Track, tracking

logger = logging.getLogger(__name__)

RUN_FORMAT = 3
"""Of ``run.json``; rises when runs of older versions can no longer be resumed."""

RESULTS = (
    *("metrics.json", "history.jsonl", "report.html", "generations_test.jsonl"),
    *("predictions_val.csv", "predictions_test.csv"),
)
"""What a finished run leaves in its folder beside the best weights."""

IMMATERIAL = {
    *("output_dir", "data_path", "data_dir", "ode_checkpoint", "log_file", "report_to"),
    *("report_patients", "show_values", "seeds", "ablation", "resume", "save_every"),
    *("allow_duplicates", "arms", "reference", "explain", "patients", "open"),
    *("batch_size", "gradient_accumulation", "gradient_checkpointing"),
}
"""Flags that do not change a result; files are known by their content, batches by their product."""


# --------------------------------------------------------------------------- places


def stage_name(args: Namespace) -> str:
    """Return the stage that the flags choose: the name of its folder."""
    return "trajectory" if args.trajectory_only else str(args.mode)


def stage_paths(folder: Path) -> list[Path]:
    """Return all places where a stage writes: its folder, its tracker's, the best of stage 1."""
    best = [folder.parent / TRAJECTORY_FILE] if folder.name == "trajectory" else []
    return [folder, tracker_folder(folder), *best]


def tracker_folder(folder: Path) -> Path:
    """Return the place for the files of a stage's tracker."""
    return folder.parent / "tracker" / folder.name


def state_store(folder: Path) -> StateStore:
    """Return the store of a stage's training states."""
    return StateStore(folder / "last")


def write_history(folder: Path | None, history: list[dict[str, Any]]) -> None:
    """Write ``history.jsonl``, an object an epoch, by the first of several processes."""
    if folder and processes().is_main_process:
        lines = [json.dumps(line) + "\n" for line in history]
        write_text(folder / "history.jsonl", "".join(lines))


def log_path(args: Namespace, folder: Path) -> Path | None:
    """Return the path of the run's log, None for none.

    Raises:
        InputError: no file can be written there, or what lies there is no log of this program.
    """
    if args.log_file == "none" or args.dry_run:
        return None
    if args.log_file == "auto":
        return folder / f"train_{datetime.now():%Y%m%d_%H%M%S}.log"
    path = Path(args.log_file)
    if not path.parent.is_dir():
        raise InputError(f"--log_file {path}: give a file in a folder that exists")
    if path.suffix != ".log" and path.absolute().parent == folder.absolute():
        raise InputError(f"--log_file {path}: a result may be written there: name it NAME.log")
    check_log_file(path)
    return path


# --------------------------------------------------------------------------- what a run is


def given_stage1(args: Namespace) -> TrajectoryCheckpoint | None:
    """Read the trained stage 1 that a command names, None where it names none.

    Raises:
        InputError: as ``read_trajectory``.
    """
    return read_trajectory(args.ode_checkpoint) if args.ode_checkpoint else None


def run_data(
    args: Namespace,
    dataset: TrajectoryDataset,
    prompts: PromptOptions,
    stage1: TrajectoryCheckpoint | None,
) -> Data:
    """Prepare the data of a run; the stage 1 below a language model decides the inputs.

    Raises:
        InputError: as ``prepare_data``.
    """
    return prepare_data(
        dataset,
        max_samples=args.max_samples,
        seed=args.seed,
        prompts=prompts,
        inputs=stage1.config["inputs"] if stage1 else None,
        facts=args.facts == "on",
        prediction_time=args.prediction_time == "on",
    )


def run_facts(args: Namespace, data: Data, stage1: TrajectoryCheckpoint | None) -> dict[str, Any]:
    """Return what makes a run repeatable: flags, versions, commit, hashes of files, data, split.

    A base model of the hub is downloaded here, so that its commit is known.

    Raises:
        InputError: the base model cannot be had.
    """
    base = {} if args.trajectory_only else base_facts(args.model_name)
    accumulate = 1 if args.trajectory_only else args.gradient_accumulation
    facts = {
        "format": RUN_FORMAT,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "versions": versions(),
        "git_commit": git_commit(),
        "code_sha256": code_hash(),
        "processes": processes().num_processes,
        "rows_a_step": args.batch_size * accumulate,
        "seed": args.seed,
        "stage_1_sha256": stage1.sha256 if stage1 else None,
        "base_revision": base.get("base_revision"),
        "base_sha256": base.get("base_sha256"),
        "device": str(default_device()),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "data": data.description(),
        "time_scale": args.time_scale or data.dataset.time_scale,
        "split": {
            part: {"n": len(rows), "events": int(data.dataset.labels[rows].sum())}
            for part, rows in data.split.items()
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write ``run.json`` with a hash of its content."""
    content = {key: value for key, value in run.items() if key != "facts_sha256"}
    write_json(folder / "run.json", {**content, "facts_sha256": json_hash(content)})


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``run.json``, None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / "run.json"
    try:
        run: dict[str, Any] = read_json(path)
        content = {key: value for key, value in run.items() if key != "facts_sha256"}
        if run["facts_sha256"] != json_hash(content):
            raise ValueError("its hash differs")
        if run.get("format") != RUN_FORMAT:
            raise InputError(f"{path}: of another version: start again without --resume")
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged: start again without --resume") from error
    return run


def differences(known: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """Return in what two runs differ that changes their results; both as ``run_facts``."""
    then, now = known["arguments"], facts["arguments"]
    found = [
        f"--{name} was {then.get(name)}, is {now.get(name)}"
        for name in sorted({*then, *now} - IMMATERIAL)
        if then.get(name) != now.get(name) and (name != "deterministic" or facts["device"] != "cpu")
    ]
    if known["data"] != facts["data"] and not found:
        found.append("the data are not the same")
    if known.get("time_scale", facts["time_scale"]) != facts["time_scale"] and not found:
        found.append(f"the time scale was {known['time_scale']}, is {facts['time_scale']}")
    if known["stage_1_sha256"] != facts["stage_1_sha256"]:
        found.append("--ode_checkpoint is another file")
    if any(known[key] != facts[key] for key in ("base_revision", "base_sha256")):
        found.append(f"--model_name {now['model_name']} holds another model or revision")
    if known["rows_a_step"] != facts["rows_a_step"]:
        rows = f"{known['rows_a_step']}, is {facts['rows_a_step']}"
        found.append(f"--batch_size times --gradient_accumulation was {rows}")
    if known["processes"] != facts["processes"]:
        found.append(f"begun with {known['processes']} processes, now {facts['processes']}")
    return found


# --------------------------------------------------------------------------- a run's life


@contextlib.contextmanager
def opened(args: Namespace, folder: Path | None, facts: dict[str, Any]) -> Iterator[Track]:
    """Hold a stage's folder for the length of a run, begun or resumed; yield its tracker.

    Call it when all else is known to work: an earlier result is moved aside here, and comes back if
    the run ends before its first state. Each process must call; the first one acts. Without a
    folder nothing is written.

    Raises:
        InputError: the place cannot be written, or another run is at work there.
    """
    if folder is None:
        yield lambda metrics, step: None
        return
    first = processes().is_main_process
    with _lock(folder) if first else contextlib.nullcontext():
        if args.resume:
            check_resumable(folder, facts)  # what was read before the lock may have changed
        moves = names_aside(stage_paths(folder)) if first and not args.resume else {}
        try:
            if first:
                _clean_up(folder)
                if not args.resume:
                    _make_folder(folder, facts, moves)
                if log := log_path(args, folder):
                    RUN_LOG.open(log)
            processes().wait_for_everyone()
            numbers = {k: v for k, v in vars(args).items() if isinstance(v, (int, float))}
            with tracking(args.report_to, tracker_folder(folder), numbers) as track:
                yield track
        except BaseException:
            if first and not (args.resume or state_store(folder).files() or is_complete(folder)):
                _restore(folder, moves)
            raise


def _make_folder(folder: Path, facts: dict[str, Any], moves: dict[Path, Path]) -> None:
    """Move an earlier result aside, make the folder and write ``run.json``."""
    with _output_errors(folder):
        for path, aside in moves.items():
            path.rename(aside)
            unfinished = bool(state_store(aside).files())
            hint = "; --resume would have continued it" if unfinished else ""
            logger.info("an earlier result was moved to %s%s", aside, hint)
        folder.mkdir()
        write_run(folder, facts)


def _restore(folder: Path, moves: dict[Path, Path]) -> None:
    """Remove what a run made before its first state, and move the earlier result back."""
    with SIGNALS.deferred():
        for path in stage_paths(folder):
            if path not in moves or os.path.lexists(moves[path]):  # else it was never moved
                remove(path)
        with contextlib.suppress(OSError):  # it holds another stage's, or does not exist
            tracker_folder(folder).parent.rmdir()
        for path, aside in moves.items():
            if os.path.lexists(aside):
                aside.rename(path)
                logger.info("%s was moved back", path)


def is_finished(folder: Path, facts: dict[str, Any]) -> bool:
    """Return whether a run that is to be resumed has nothing left to do.

    Raises:
        InputError: no run was begun there, or another one; or a finished run is damaged.
    """
    known = check_resumable(folder, facts)
    if "results_sha256" in known:
        if processes().is_main_process:
            remove(state_store(folder).folder)
        logger.info("%s: that run is finished: nothing left to do", folder)
        return True
    for key in ("versions", "code_sha256"):
        if known[key] != facts[key]:
            logger.warning("%s differ from the start of the run: last bits may differ", key)
    return False


def check_resumable(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return ``run.json`` of the run in a folder, which must be the one of this command and whole.

    Args:
        folder: of the stage.
        facts: of the run as it would be now.

    Raises:
        InputError: no run was begun there, it was begun otherwise, or its results are damaged.
    """
    known = read_run(folder)
    if known is None or not ("results_sha256" in known or state_store(folder).files()):
        raise InputError(f"--resume: no run was begun in {folder}: start it without --resume")
    if other := differences(known, facts):
        raise InputError(
            f"--resume {folder}: that run was begun otherwise: {'; '.join(other)}: give the same "
            "command, or start a new run without --resume"
        )
    check_results(folder, known)
    return known


def is_complete(folder: Path) -> bool:
    """Return whether a run has written all its results; their hashes come last.

    Raises:
        InputError: ``run.json`` is damaged.
    """
    return "results_sha256" in (read_run(folder) or {})


def finish_run(folder: Path | None, tokens: float) -> None:
    """Add cost and hashes of all results to ``run.json``; the training states are removed.

    Args:
        folder: of the stage.
        tokens: of a patient, mean over the training part.
    """
    if folder is None or not processes().is_main_process:
        return
    paths = [*(folder / name for name in RESULTS), *sorted((folder / "best").rglob("*"))]
    if folder.name == "trajectory":
        paths.append(folder.parent / TRAJECTORY_FILE)
    hashes = {p.relative_to(folder.parent).as_posix(): file_hash(p) for p in paths if p.is_file()}
    run = read_run(folder)
    assert run is not None
    cost = {"tokens": tokens, "memory_mib": peak_mib()}
    write_run(folder, {**run, "cost": cost, "results_sha256": hashes})
    remove(state_store(folder).folder)


def check_results(folder: Path, run: dict[str, Any]) -> None:
    """Check the files of a finished run against the hashes of its ``run.json``.

    Raises:
        InputError: naming a file that is missing or was changed.
    """
    for name, digest in run.get("results_sha256", {}).items():
        path = folder.parent / name
        if file_hash(path) != digest:
            raise InputError(
                f"{folder}: that run is finished, but {path} is missing or was changed: start it "
                "again without --resume"
            )


def progress_of(folder: Path, facts: dict[str, Any]) -> str:
    """Return how much of a run has been done: "all", "part" or "none".

    A run of other flags, data, code, versions or number of processes counts as none.

    Args:
        folder: of the stage.
        facts: of the run as it would be now.
    """
    try:
        known = read_run(folder)
        other = known and [key for key in ("versions", "code_sha256") if known[key] != facts[key]]
        if not known or other or differences(known, facts):
            return "none"
        check_results(folder, known)
        if "results_sha256" in known:
            return "all"
        if not state_store(folder).files():
            return "none"
        state_store(folder).newest()
    except InputError as error:  # it will be moved aside and made anew
        logger.warning("%s", error)
        return "none"
    return "part"


def folder_identity(folder: Path) -> int | None:
    """Return what tells a folder from another of its name, None where there is none."""
    return folder.stat().st_ino if folder.exists() else None


def interruptible(args: Namespace, action: Callable[[], Any]) -> int:
    """Run a training; return the exit code, and say what an interrupted one has reached."""
    folder = args.output_dir / stage_name(args)
    before = folder_identity(folder)
    try:
        action()
    except KeyboardInterrupt as stop:
        began = args.resume or folder_identity(folder) != before
        logger.error("%s", describe_stop(folder, began=began))
        return getattr(stop, "code", EXIT_INTERRUPTED)
    return EXIT_DONE


def describe_stop(folder: Path, *, began: bool) -> str:
    """Describe what an interrupted run has reached.

    Args:
        folder: of the stage.
        began: whether the run has kept a checkpoint; where ``begin_run`` moved an earlier result
            back, ``folder_identity`` is what it was before.
    """
    if not began:
        return "interrupted before the first step: nothing was changed"
    best = any(path.exists() for path in (folder / "best", *stage_paths(folder)[2:]))
    figures = (folder / "metrics.json").exists()
    return "; ".join(
        [
            f"interrupted: {'the best weights so far are' if best else 'no weights yet'} in "
            f"{folder.parent}",
            "test figures are written" if figures else "no test figures yet",
            *(["the same command with --resume continues"] if state_store(folder).files() else []),
        ]
    )


def _clean_up(folder: Path) -> None:
    """Remove what killed runs left half-written."""
    for place in (folder, state_store(folder).folder):
        clean(place)
    for path in stage_paths(folder):
        remove(partial_path(path))


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Make the folder above a stage's and keep other runs from the stage."""
    with contextlib.ExitStack() as held:
        with _output_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder))
        yield


@contextlib.contextmanager
def _output_errors(folder: Path) -> Iterator[None]:
    """Name the flag in errors of writing.

    Raises:
        InputError: the folder above a stage's cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"--output_dir {folder.parent}: {error.strerror}") from error
