"""A plan of runs: folds, seeds, repeats, sites and variants are runs that are carried out alike."""

from __future__ import annotations

import logging
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import joblib
import torch
from joblib import parallel
from tqdm.auto import tqdm

from medgemma_clinical import distributed
from medgemma_clinical.commands import run_folder
from medgemma_clinical.commands.command_line import EXIT_DONE, EXIT_INTERRUPTED
from medgemma_clinical.commands.logs import RUN_LOG, command_logging, quiet_console, recorded
from medgemma_clinical.commands.prediction_files import auroc_of
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.files import InputError, RunFault, owner_only
from medgemma_clinical.training.signals import begin_process

logger = logging.getLogger(__name__)

Train = Callable[[Namespace, TrajectoryDataset], int]
"""Trains and tests one stage on data that are read; returns an exit code. Worker processes find it
by its name in its module."""

OWN_BACKENDS = ("loky", "threading", "multiprocessing", "sequential")
"""Backends of joblib under which the workers are this program's; others are a cluster's."""

ONE_TRAINING = threading.Lock()
"""Held by a run in a worker of a cluster: random generators and log belong to one run."""


@dataclass(frozen=True)
class Run:
    """One training of a plan."""

    title: str
    args: Namespace
    dataset: TrajectoryDataset


def filled(args: Namespace, mark: str, number: int, **changes: object) -> Namespace:
    """Return arguments with a number in place of a mark in texts and paths, and with changes."""
    texts = {
        name: type(value)(str(value).replace(mark, str(number)))
        for name, value in vars(args).items()
        if isinstance(value, (str, Path))
    }
    return Namespace(**{**vars(args), **texts, **changes})


def check_stage1(path: Path | None, flags: str, mark: str, example: Path) -> None:
    """Refuse one stage 1 for several runs: it has learned from what some of them test."""
    if path is not None and mark not in str(path):
        raise InputError(
            f"{flags}: each run has a stage 1 of its own: write {mark} for its number, as in "
            f"--ode_checkpoint {example}"
        )


def carry_out(runs: Sequence[Run], train: Train) -> int:
    """Train each run that is not finished; return the first exit code that is no success."""
    with distributed.show_progress((), "runs", len(runs)) as bar:
        cluster, n_processes = active_cluster(), distributed.processes().num_processes
        if cluster and n_processes == 1:
            # A warning: without logging of the user's own nothing below it is shown.
            text = "%d runs go to the workers of joblib's %s: the rows of patients travel there"
            logger.warning(text, len(runs), cluster)
            tasks = (joblib.delayed(run_on_cluster)(run, train) for run in runs)
            return first_code(parallel_codes(-1)(tasks), bar)
        # Each has the threads of a stage 1 alone: no result depends on the number of processes.
        jobs = min(len(runs), joblib.cpu_count() // distributed.stage1_threads())
        alone = jobs <= 1 or torch.cuda.is_available() or n_processes > 1
        if alone or not all(run.args.trajectory_only for run in runs):
            return first_code((run_or_continue(run, train) for run in runs), bar)
        return run_in_parallel(runs, train, jobs, bar)


def active_cluster() -> str:
    """Return the name of the user's joblib backend if its workers are not ours, else empty."""
    kind = type(parallel.get_active_backend()[0])  # Ray's is a subclass of multiprocessing's
    is_own = kind in [parallel.BACKENDS.get(name) for name in OWN_BACKENDS]
    return "" if is_own else kind.__name__.removesuffix("Backend")


def parallel_codes(jobs: int) -> joblib.Parallel:
    """Return what carries out tasks in the active backend, and gives each result as it comes."""
    can_yield = parallel.get_active_backend()[0].supports_return_generator
    # No array goes through a file: they hold patients.
    return joblib.Parallel(
        jobs, batch_size=1, max_nbytes=None, return_as="generator" if can_yield else "list"
    )


def first_code(codes: Iterable[int], bar: tqdm[Run]) -> int:
    """Return the first exit code that is not that of a finished run; later runs are not begun."""
    for code in codes:
        bar.update()
        if code != EXIT_DONE:
            return code
    return EXIT_DONE


def run_in_parallel(runs: Sequence[Run], train: Train, jobs: int, bar: tqdm[Run]) -> int:
    """Train runs of stage 1 in processes of this machine."""
    begin, threads = partial(begin_process, train.__module__), distributed.stage1_threads()
    is_shown = any(handler.get_name() == "console" for handler in logging.root.handlers)
    try:
        with joblib.parallel_config("loky", initializer=begin, inner_max_num_threads=threads):
            tasks = (joblib.delayed(run_apart)(run, train, is_shown) for run in runs)
            return first_code(parallel_codes(jobs)(tasks), bar)
    except BrokenProcessPool as error:
        raise RunFault(
            "the process of a run was ended, perhaps out of memory: rerun the command to "
            "continue; LOKY_MAX_CPU_COUNT=1 in the environment trains one at a time"
        ) from error
    except KeyboardInterrupt as stop:
        logger.error("interrupted: rerun to continue in %s", runs[0].args.output_dir.parent)
        return getattr(stop, "code", EXIT_INTERRUPTED)


def run_apart(run: Run, train: Train, is_shown: bool) -> int:
    """Train in a process of its own; ``is_shown``: on the console."""
    distributed.set_environment()
    kernels = distributed.exact_kernels(deterministic=run.args.deterministic)
    with owner_only(), kernels, command_logging(first=is_shown):
        return run_or_continue(run, train)


def run_on_cluster(run: Run, train: Train) -> int:
    """Train in a worker that is not ours: its signals and its logging stay as they are."""
    distributed.set_environment()
    kernels = distributed.exact_kernels(deterministic=run.args.deterministic)
    with ONE_TRAINING, owner_only(), kernels, recorded():
        return run_or_continue(run, train)


def run_or_continue(run: Run, train: Train) -> int:
    """Train, continue or skip a run; the console gets one line, the rest goes to its log file."""
    folder, code = run_folder.stage_folder(run.args), EXIT_DONE
    try:
        with quiet_console():
            if (done_part := run_folder.progress_of(run.args, run.dataset)) != "all":
                distributed.reset_peak_memory()
                resumed = Namespace(**{**vars(run.args), "resume": done_part == "part"})
                code = train(resumed, run.dataset)
    except InputError as error:
        raise InputError(f"{run.title}: {error}", error.value) from error
    finally:
        RUN_LOG.begin()  # the lines below belong to no run
    if code == EXIT_DONE:
        how = {"all": "already there, ", "part": "continued, ", "none": ""}[done_part]
        part = "folds" if run.args.final else "test"
        text = "%s: %s%s AUROC %s: %s"
        logger.info(text, run.title, how, part, auroc_of(folder, part), folder)
    return code
