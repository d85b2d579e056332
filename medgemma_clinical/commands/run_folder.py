"""The folder of a stage's run: begun, resumed, finished; an earlier result is moved aside."""

from __future__ import annotations

import contextlib
import json
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from medgemma_clinical import files, provenance
from medgemma_clinical.commands.command_line import EXIT_DONE, EXIT_INTERRUPTED
from medgemma_clinical.commands.logs import RUN_LOG, check_log_file
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.training_data import Data, prepare_data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import default_device, peak_mib, processes
from medgemma_clinical.files import InputError
from medgemma_clinical.models import checkpoints, text_encoder
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, TrajectoryCheckpoint
from medgemma_clinical.models.language_model import base_record
from medgemma_clinical.provenance import HISTORY, METRICS, RUN_FORMAT, read_run
from medgemma_clinical.training.state import has_state, read_state
from medgemma_clinical.training.trackers import Track, tracking

logger = logging.getLogger(__name__)

RESULTS = (
    *(METRICS, HISTORY, "report.html", "tripod.md", checkpoints.BASELINES, checkpoints.TEXT),
    *("predictions_val.csv", "predictions_test.csv", "generations_test.jsonl", checkpoints.FACTS),
)
"""What a finished run leaves in its folder beside the best weights."""

FREE = {"ablation", "seeds", "folds", "leave_out", "data_path", "data_dir", "site", "show_values"}
FREE |= {"allow_duplicates", "batch_size", "gradient_accumulation", "gradient_checkpointing"}
FREE |= {"ode_checkpoint", "allow_untested_model", "output_dir", "report_patients", "min_cell"}
FREE |= {"log_file", "report_to", "resume", "save_every", "text_model"}
"""Flags that may change at ``--resume``: files are known by content, batches by their product."""

MATERIAL = {
    "data": "the data differ",
    "time_scale": "the time scale differs",
    "stage_1_sha256": "--ode_checkpoint is another file",
    "base_revision": "--model_name is of another revision",
    "base_sha256": "--model_name is another model",
    "text_encoder": "--text_model is another model",
    "rows_a_step": "--batch_size times --gradient_accumulation differs",
    "processes": "the number of processes differs",
}
"""Keys of ``run.json`` that also change a result, with the message about a difference."""

SOFTWARE = ("versions", "code_sha256")
"""Keys of ``run.json`` that may change the last bits of a result."""


class DifferentRunError(InputError):
    """A folder holds the run of another command, data or model."""


def stage_folder(args: Namespace) -> Any:
    """Return the folder of the stage that the flags choose; None where nothing is written."""
    name = "trajectory" if args.trajectory_only else args.mode
    return args.output_dir and args.output_dir / name


def folds_folder(args: Namespace) -> Path:
    """Return the folder of the runs of ``--folds`` or ``--leave_out``, and of their results."""
    kind = "leave_out" if args.leave_out else "folds"
    return Path(args.output_dir, f"{kind}_{stage_folder(args).name}")


def tracker_folder(folder: Path) -> Path:
    """Return the folder of a stage's tracker."""
    return folder.parent / "tracker" / folder.name


def stage_paths(folder: Path) -> list[Path]:
    """Return all paths that a stage writes: its folder, its tracker's, the best of stage 1."""
    best = [folder.parent / TRAJECTORY_FILE] if folder.name == "trajectory" else []
    return [folder, tracker_folder(folder), *best]


def state_folder(folder: Path) -> Path:
    """Return the folder of a stage's training states."""
    return folder / "last"


def write_history(folder: Path | None, history: list[dict[str, Any]]) -> None:
    """Write ``history.jsonl``, an object an epoch, by the first of several processes."""
    if folder and processes().is_main_process:
        files.write_text(folder / HISTORY, "".join(json.dumps(x) + "\n" for x in history))


def log_path(log_file: str, folder: Path) -> Path | None:
    """Return the path of the run's log, None for none; refuse one that cannot be had."""
    if log_file == "none":
        return None
    if log_file == "auto":
        return folder / f"train_{datetime.now():%Y%m%d_%H%M%S}.log"
    path = Path(log_file)
    check_log_file(path)
    return path


def given_stage1(args: Namespace) -> TrajectoryCheckpoint | None:
    """Read the trained stage 1 that a command names, None where it names none."""
    return checkpoints.read_trajectory(args.ode_checkpoint) if args.ode_checkpoint else None


def prompt_options(args: Namespace) -> PromptOptions:
    """Return what prompts hold; a model that writes reports also reads what they compute."""
    writes = args.mode == "generative" and not args.trajectory_only
    return PromptOptions(args.series_text, context=args.text_context == "full", computed=writes)


def run_data(
    args: Namespace, dataset: TrajectoryDataset, stage1: TrajectoryCheckpoint | None
) -> Data:
    """Prepare the data of a run; the stage 1 below a language model decides the inputs."""
    return prepare_data(
        with_text_states(args, dataset),
        max_samples=args.max_samples,
        seed=args.seed,
        prompts=prompt_options(args),
        inputs=stage1.config["inputs"] if stage1 else None,
        static=args.facts == "on",
        prediction_time=args.prediction_time == "on",
        text_features=args.text_features,
    )


def with_text_states(args: Namespace, dataset: TrajectoryDataset) -> TrajectoryDataset:
    """Return a data set with the states that a run reads of texts; without those of others."""
    if args.text_features != "frozen":
        return text_encoder.without_states(dataset)
    if not args.text_model:
        raise InputError("--text_features frozen: name the language encoder by --text_model")
    cache = args.output_dir and args.output_dir / text_encoder.CACHE
    record = text_encoder.encoder_record(args.text_model)
    return text_encoder.with_states(dataset, args.text_model, record, cache)


# --------------------------------------------------------------------------- run.json


def run_record(args: Namespace, data: Data, stage1: TrajectoryCheckpoint | None) -> dict[str, Any]:
    """Return what makes a run repeatable: flags, versions, hashes of files, data and split."""
    # Downloads a base model of the hub, so that its commit is known.
    base = {} if args.trajectory_only else base_record(args.model_name)
    accumulate = 1 if args.trajectory_only else args.gradient_accumulation
    run = {
        "format": RUN_FORMAT,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "code_sha256": provenance.code_hash(),
        "processes": processes().num_processes,
        "rows_a_step": args.batch_size * accumulate,
        "seed": args.seed,
        "stage_1_sha256": stage1.sha256 if stage1 else None,
        "base_revision": base.get("base_revision"),
        "base_sha256": base.get("base_sha256"),
        "text_encoder": {**data.dataset.text_encoder},
        "device": str(default_device()),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "data": data.description(),
        "time_scale": args.time_scale or data.dataset.time_scale,
        "split": {
            part: {"n": len(rows), "events": int(data.dataset.labels[rows].sum())}
            for part, rows in data.split.items()
        },
    }
    as_read_again: dict[str, Any] = json.loads(json.dumps(run))
    return as_read_again


# --------------------------------------------------------------------------- a run's life


@contextlib.contextmanager
def opened(
    folder: Path | None, run: dict[str, Any], *, resume: bool, log_file: str, report_to: str
) -> Iterator[Track]:
    """Lock and prepare a stage's folder for a run; yield its tracker. Each process must call.

    Call it when all else is known to work: an earlier result is moved aside here.
    """
    if folder is None:
        yield lambda metrics, step: None
        return
    with contextlib.ExitStack() as stack:
        if processes().is_main_process:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(files.locked(folder))
                clean(folder)
                if not resume:
                    begin(folder, run)
            except OSError as error:
                raise InputError(f"--output_dir {folder.parent}: {error.strerror}") from error
            if log := log_path(log_file, folder):
                RUN_LOG.open(log)
        processes().wait_for_everyone()
        numbers = {k: v for k, v in run["arguments"].items() if isinstance(v, (int, float))}
        yield stack.enter_context(tracking(report_to, tracker_folder(folder), numbers))


def clean(folder: Path) -> None:
    """Remove what killed runs left half-written."""
    files.clean(folder)
    files.clean(state_folder(folder))
    for path in stage_paths(folder):
        files.remove(files.partial_path(path))


def begin(folder: Path, run: dict[str, Any]) -> None:
    """Create the folder of a new run; move an earlier one aside."""
    for aside in files.move_aside(stage_paths(folder))[:1]:  # the folder; others have its number
        hint = "; --resume would have continued it" if has_state(state_folder(aside)) else ""
        logger.info("earlier result moved to %s%s", aside, hint)
    folder.mkdir()
    files.write_json(folder / "run.json", run)


def check_run(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Return ``run.json`` of the run in a folder; refuse another command's and a damaged one."""
    old_run = read_run(folder)
    if old_run is None or not ("results_sha256" in old_run or has_state(state_folder(folder))):
        raise InputError(f"{folder}: no run to resume: start it without --resume")
    old, new = old_run["arguments"], run["arguments"]
    changes = [
        f"--{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted({*old, *new}.difference(FREE))
        if old.get(name) != new.get(name)
    ]
    changes += [text for key, text in MATERIAL.items() if old_run[key] != run[key]]
    if changes:
        raise DifferentRunError(
            f"{folder}: that run differs: {'; '.join(changes)}: give the same command, "
            "or start without --resume"
        )
    for name, digest in old_run.get("results_sha256", {}).items():
        if files.file_hash(path := folder.parent / name) != digest:
            raise InputError(f"{path}: missing or changed since the end of its run: start again")
    return old_run


def is_finished(folder: Path, run: dict[str, Any]) -> bool:
    """Return whether a run that is to be resumed is finished; see ``check_run``."""
    old_run = check_run(folder, run)
    if "results_sha256" not in old_run:
        for key in SOFTWARE:
            if old_run[key] != run[key]:
                logger.warning("%s differ from the start of the run: last bits may differ", key)
        return False
    if processes().is_main_process:
        files.remove(state_folder(folder))
    logger.info("%s: the run is finished, nothing to resume", folder)
    return True


def progress_of(args: Namespace, dataset: TrajectoryDataset) -> str:
    """Return "all", "part" or "none" of a command's run."""
    stage1 = given_stage1(args)
    return progress_in(
        stage_folder(args), run_record(args, run_data(args, dataset, stage1), stage1)
    )


def progress_in(folder: Path, run: dict[str, Any]) -> str:
    """Return "all", "part" or "none" of a run; with other flags, data or software, "none"."""
    if not (folder / "run.json").exists():
        return "none"
    try:
        old_run = check_run(folder, run)
        if any(old_run[key] != run[key] for key in SOFTWARE):
            return "none"
        if "results_sha256" in old_run:
            return "all"
        read_state(state_folder(folder))
    except DifferentRunError:  # it is moved aside, as is said there
        return "none"
    except InputError as error:  # damaged: it is moved aside, and the run starts again
        logger.warning("%s", error)
        return "none"
    return "part"


def finish_run(folder: Path | None, tokens: float, best_model: str | None = None) -> None:
    """Add cost, recommended model and result hashes to ``run.json``; remove the training states."""
    if folder is None or not processes().is_main_process:
        return
    paths = [*(folder / name for name in RESULTS), *(folder / "best").rglob("*")]
    paths += stage_paths(folder)[2:]
    hashes = {p.relative_to(folder.parent).as_posix(): files.file_hash(p) for p in paths}
    hashes = {name: digest for name, digest in hashes.items() if digest}  # those that are there
    cost = {"tokens": tokens, "memory_mib": peak_mib()}
    run = {**(read_run(folder) or {}), "best_model": best_model, "cost": cost}
    run["results_sha256"] = hashes
    files.write_json(folder / "run.json", run)
    files.remove(state_folder(folder))


def interruptible(folder: Path, action: Callable[[], Any]) -> int:
    """Run a training; return the exit code, and log how an interrupted one continues."""
    try:
        action()
    except KeyboardInterrupt as stop:
        if has_state(state_folder(folder)):
            logger.error("interrupted: the same command with --resume continues in %s", folder)
        else:
            logger.error("interrupted before the first step: start the command again")
        return getattr(stop, "code", EXIT_INTERRUPTED)
    return EXIT_DONE
