"""Training from Python: keywords are flags of the command line, beside rows and an encoder."""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.commands import flags
from medgemma_clinical.commands.announce import EpochBar, check_output
from medgemma_clinical.commands.command_line import EXIT_DONE, Parser
from medgemma_clinical.commands.folds import PREDICTIONS, run_folds
from medgemma_clinical.commands.logs import recorded
from medgemma_clinical.commands.run_folder import METRICS, folds_folder, given_stage1, stage_folder
from medgemma_clinical.commands.several import Train
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import (
    check_gpu,
    check_launch,
    exact_kernels,
    set_environment,
)
from medgemma_clinical.files import InputError, owner_only, read_json
from medgemma_clinical.inference.fitting import (
    CrossValidation,
    fit_classification,
    fit_generative,
    fit_trajectory,
)
from medgemma_clinical.inference.hub import find_checkpoint
from medgemma_clinical.inference.scoring import check_kind
from medgemma_clinical.inference.trajectory_model import Rows, TrajectoryModel
from medgemma_clinical.models.checkpoints import TrajectoryCheckpoint, read_trajectory
from medgemma_clinical.models.trained_model import checkpoint_path
from medgemma_clinical.training.signals import SIGNALS

NOT_KEYWORDS = {
    *("trajectory_only", "mode", "demo", "ablation", "arms", "reference", "compare", "seeds"),
    *("folds", "leave_out", "final", "predict", "checkpoint", "predictions", "update", "strict"),
    *("data_path", "data_dir", "dry_run"),
    *("show_values", "export", "export_dir", "explain", "patients", "open", "ode_checkpoint"),
    "use",
}
"""Flags that choose another work, or what an argument of ``fit_trajectory`` says."""

STAGE_1, STAGES_2_3 = "stage 1", "stages 2 and 3"
UNREAD = {
    STAGE_1: {flag[2:] for flag in flags.UNREAD_FLAGS["--trajectory_only"].split()},
    STAGES_2_3: {"trajectory_epochs"},
}
"""Keywords of the other stages alone."""

NOT_OF_FOLDS = NOT_KEYWORDS - {"folds", "leave_out", "final", "ode_checkpoint"}

OF_A_FOLDER = ("resume", "log_file", "report_to", "save_every", "report_patients")
"""Flags that have no use where nothing is written."""

FITTING = threading.Lock()
"""Held while a model is trained: random generators, signals and log belong to one run."""

Reader = Callable[[Namespace, Any], TrajectoryDataset]


def fit(
    build_parser: Callable[[], Parser],
    read: Reader,
    train: Callable[..., TrajectoryModel | None],
    stage: dict[str, Any],
    rows: Rows,
    encoder: TrajectoryModel | str | Path | None,
    keywords: dict[str, Any],
) -> TrajectoryModel:
    """Train the stage that ``stage``, its flags, chooses; see ``fit_classification``.

    ``build_parser``, ``read`` and ``train`` are the script's: flags, reader, training of a stage.
    """
    given = {} if encoder is None else {"ode_checkpoint": "encoder"}
    with fitting(build_parser, {**stage, **given}, keywords, NOT_KEYWORDS) as args:
        dataset = read_rows(rows, args, keywords, read)
        stage1 = given_stage1(args) if encoder is None else read_encoder(encoder)
        model = train(args, dataset, stage1)
    return model or TrajectoryModel.from_pretrained(stage_folder(args))


def cross_validate(
    build_parser: Callable[[], Parser],
    read: Reader,
    train: Train,
    stage: dict[str, Any],
    rows: Rows,
    keywords: dict[str, Any],
) -> CrossValidation:
    """Judge a stage in folds; see ``fitting.cross_validate``; ``train`` is that of a command."""
    with contextlib.ExitStack() as stack:
        if keywords.get("output_dir") is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            keywords = {**keywords, "output_dir": folder, "log_file": "none"}
        args = stack.enter_context(fitting(build_parser, stage, keywords, NOT_OF_FOLDS))
        if run_folds(args, lambda own: read_rows(rows, own, keywords, read), train) == EXIT_DONE:
            path, text = folds_folder(args) / PREDICTIONS, {"id": str, "patient": str}
            table = pd.read_csv(path, dtype=text, keep_default_na=False)
            return CrossValidation(table, read_json(folds_folder(args) / METRICS))
    raise KeyboardInterrupt


@contextlib.contextmanager
def fitting(
    build_parser: Callable[[], Parser],
    stage: dict[str, Any],
    keywords: dict[str, Any],
    refused: set[str],
) -> Iterator[Namespace]:
    """Check the keywords of a training, and yield its arguments for the length of it."""
    if unknown := sorted(refused & keywords.keys()):
        raise TypeError(f"unexpected keyword {unknown[0]!r}")
    own, other = STAGE_1, STAGES_2_3
    if "mode" in stage:
        own, other = other, own
    if wrong := sorted(UNREAD[own] & keywords.keys()):
        epochs = {"epochs": ": stage 1 takes trajectory_epochs"}
        raise TypeError(f"{wrong[0]} is for {other}{epochs.get(wrong[0], '')}")
    unused = [name for name in OF_A_FOLDER if keywords.get(name)]
    if keywords.get("output_dir") is None and unused:
        raise InputError(f"{', '.join(unused)}: give output_dir too, or leave it out")
    set_environment()
    args, typed = build_parser().parse_keywords({**keywords, **stage})
    flags.check_flags(flags.complete(args), typed)
    check_launch()
    check_gpu()
    check_output(args)
    if not FITTING.acquire(blocking=False):
        raise RuntimeError("another model is being trained in this process: wait for its end")
    try:
        kernels = exact_kernels(deterministic=args.deterministic)
        with SIGNALS.installed(kills=False), kernels, recorded(EpochBar()), owner_only():
            yield args
    except KeyboardInterrupt as stop:
        if args.output_dir:
            stop.add_note(f"resume=True continues the run in {args.output_dir}")
        raise
    finally:
        FITTING.release()


def set_signatures(defaults: Mapping[str, Any]) -> None:
    """Let ``help`` and editors know the keywords of each stage's function, with their defaults."""
    function: Any
    for function in (fit_trajectory, fit_classification, fit_generative):
        unread = NOT_KEYWORDS | UNREAD[STAGE_1 if function is fit_trajectory else STAGES_2_3]
        signature = inspect.signature(function)
        *arguments, flags_ = signature.parameters.values()
        keyword = partial(flags_.replace, kind=flags_.KEYWORD_ONLY, annotation=flags_.empty)
        names = [name for name in defaults if name not in unread]
        arguments += [keyword(name=name, default=defaults[name]) for name in names]
        function.__signature__ = signature.replace(parameters=arguments)


def read_encoder(encoder: TrajectoryModel | str | Path) -> TrajectoryCheckpoint:
    """Return a trained stage 1 from a model, a path or a repository of the hub."""
    if isinstance(encoder, TrajectoryModel):
        return encoder.checkpoint()
    return read_trajectory(checkpoint_path(find_checkpoint(encoder, None)))


def read_rows(
    rows: Rows, args: Namespace, keywords: Mapping[str, Any], read: Reader
) -> TrajectoryDataset:
    """Read the rows of a training; return a data set as given."""
    check_kind(rows)
    if not isinstance(rows, TrajectoryDataset):
        return read(args, Path(rows) if isinstance(rows, (str, os.PathLike)) else rows)
    if late := sorted(set(rows.options) & keywords.keys()):
        raise InputError(f"the data set has been read: leave {', '.join(late)} out")
    args.dataset = rows.name
    return rows
