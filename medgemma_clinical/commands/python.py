"""Training from Python: one function a stage, and folds; keywords are flags of the command line."""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.commands import flags
from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.folds import PREDICTIONS, run_folds
from medgemma_clinical.commands.logs import recorded
from medgemma_clinical.commands.run_folder import METRICS, folds_folder, stage_folder
from medgemma_clinical.commands.run_log import check_output
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import check_gpu, check_launch, exact_kernels, set_environment
from medgemma_clinical.files import InputError, owner_only, read_json
from medgemma_clinical.inference.hub import find_checkpoint
from medgemma_clinical.inference.scoring import as_source
from medgemma_clinical.inference.trajectory_model import (
    Program,
    Rows,
    TrajectoryModel,
    results_table,
)
from medgemma_clinical.models.checkpoints import TrajectoryCheckpoint, read_trajectory
from medgemma_clinical.models.encoders import register
from medgemma_clinical.models.trained_model import checkpoint_path
from medgemma_clinical.training.signals import SIGNALS

FITTING = threading.RLock()
"""Held while a model is trained: random generators, signals and log belong to one run."""

IN_FIT = ContextVar("IN_FIT", default=False)
"""Whether this thread trains a model."""


@dataclass(frozen=True)
class Trial:
    """What a search over settings leaves out of a training, and who may end it."""

    test: bool = True  # whether the test part is scored
    baselines: bool = True  # whether they are fitted
    on_epoch: Callable[[dict[str, Any]], Any] | None = None  # a true value ends the training

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the split that are scored."""
        return ("val", "test") if self.test else ("val",)


WHOLE_RUN = Trial()


@dataclass(frozen=True, repr=False)
class CrossValidation:
    """What ``cross_validate`` found.

    Attributes:
        predictions: a row a patient's row, of the model that did not learn from the patient: id,
            label, probability, patient, fold, then the risks of baselines and ensemble.
        metrics: the content of ``metrics.json``; its part "folds" has the metrics.
    """

    predictions: pd.DataFrame
    metrics: dict[str, Any]

    def results(self) -> pd.DataFrame:
        """Return a row a model, as ``TrajectoryModel.results``."""
        return results_table(self.metrics, "folds")

    def __repr__(self) -> str:
        """Return the results, not the patients."""
        return f"{type(self).__name__}:\n{self.results()}"


def fit_trajectory(
    rows: Rows,
    *,
    test: bool = True,
    baselines: bool = True,
    on_epoch: Callable[[dict[str, Any]], Any] | None = None,
    **flags: Any,
) -> TrajectoryModel:
    """Train stage 1: encoder and head, no language model.

    Args:
        rows: a table (a DataFrame, or one of polars or pyarrow) or a file in the DKA format, or a
            data set.
        test: False leaves the test part unread, as a search over settings has to.
        baselines: False fits none, which a search need not.
        on_epoch: gets the metrics of each epoch, as in ``history.jsonl``; a true value ends the
            training.
        **flags: those of the command line without dashes, with the same defaults, as in
            ``trajectory_epochs=50``. Without ``output_dir`` nothing is written.

    Returns:
        The trained model; ``results()`` gives its metrics.

    Raises:
        TypeError: there is no such flag.
        InputError: a flag or the data are wrong; the text says where, and what to do.
    """
    return fit({"trajectory_only": True}, rows, None, flags, Trial(test, baselines, on_epoch))


def fit_classification(
    rows: Rows,
    encoder: TrajectoryModel | type | str | Path | None = None,
    *,
    test: bool = True,
    baselines: bool = True,
    on_epoch: Callable[[dict[str, Any]], Any] | None = None,
    **flags: Any,
) -> TrajectoryModel:
    """Train stage 2: MedGemma reads soft prompt and text, a head gives a probability.

    Args:
        rows: as for ``fit_trajectory``.
        encoder: a trained stage 1, or where it lies; stays frozen. None, or the class of an
            encoder of your own, trains a new one with it.
        test: as for ``fit_trajectory``, with ``baselines`` and ``on_epoch``.
        baselines: see ``test``.
        on_epoch: see ``test``.
        **flags: as for ``fit_trajectory``, for example ``model_name``, ``epochs``, ``lora_rank``.

    Returns:
        The trained model; ``results()`` gives its metrics.

    Raises:
        TypeError: there is no such flag.
        InputError: a flag, the data, stage 1 or the language model are wrong.
    """
    trial = Trial(test, baselines, on_epoch)
    return fit({"mode": "classification"}, rows, encoder, flags, trial)


def fit_generative(
    rows: Rows,
    encoder: TrajectoryModel | type | str | Path | None = None,
    *,
    test: bool = True,
    baselines: bool = True,
    on_epoch: Callable[[dict[str, Any]], Any] | None = None,
    **flags: Any,
) -> TrajectoryModel:
    """Train stage 3: MedGemma reads soft prompt and text, and writes a verdict with a report.

    Arguments, result and errors are those of ``fit_classification``.
    """
    trial = Trial(test, baselines, on_epoch)
    return fit({"mode": "generative"}, rows, encoder, flags, trial)


def cross_validate(
    rows: Rows,
    folds: int = 5,
    stage: str = "trajectory",
    encoder: type | str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    **flags: Any,
) -> CrossValidation:
    """Score every patient by a model that was trained on the others, in folds of patients.

    Metrics that compare risks are means over the folds, each with the interval of a bootstrap of
    the patients; baselines are fitted on the same folds.

    Args:
        rows: as for ``fit_trajectory``; a column ``split`` is not read.
        folds: number of parts into which the patients are split, stratified by the event.
        stage: "trajectory", "classification" or "generative".
        encoder: of the other stages: path of each fold's trained stage 1, ``{fold}`` in place of
            the fold's number. Or a class of your own for new ones.
        output_dir: run folder; the same call goes on there after a stop. None keeps nothing.
        **flags: those of the command line without dashes, as for ``fit_trajectory``;
            ``leave_out="COLUMN"`` holds out each site of a column in place of folds, and
            ``final=True`` with an ``output_dir`` also trains a model on all patients there.

    Returns:
        Predictions, metrics, and ``results()``.

    Raises:
        TypeError: there is no such flag.
        InputError: a flag or the data are wrong, or there are too few patients for the folds.
    """
    chosen = {"trajectory_only": True} if stage == "trajectory" else {"mode": stage}
    keywords = {**flags, "folds": None if flags.get("leave_out") else folds}
    name = "encoder" if isinstance(encoder, type) else "ode_checkpoint"
    keywords |= {"output_dir": output_dir} | ({name: encoder} if encoder else {})
    with contextlib.ExitStack() as stack:
        if output_dir is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            keywords |= {"output_dir": folder, "log_file": "none"}
        args = stack.enter_context(fitting(chosen, keywords, "cross_validate"))
        train = TrajectoryModel.program.train
        if run_folds(args, lambda own: read_rows(rows, own, keywords), train) == EXIT_DONE:
            path, text = folds_folder(args) / PREDICTIONS, {"id": str, "patient": str}
            table = pd.read_csv(path, dtype=text, keep_default_na=False)
            return CrossValidation(table, read_json(folds_folder(args) / METRICS))
    raise KeyboardInterrupt


def fit(
    stage: dict[str, Any],
    rows: Rows,
    encoder: TrajectoryModel | type | str | Path | None,
    keywords: dict[str, Any],
    trial: Trial,
) -> TrajectoryModel:
    """Train the stage that ``stage``, its flags, chooses; see ``fit_classification``."""
    if keywords.get("output_dir") is not None and not (trial.test and trial.baselines):
        raise InputError("output_dir: a run folder has test part and baselines: leave it out")
    if isinstance(encoder, type):
        keywords, encoder = {"encoder": encoder, **keywords}, None
    given = {} if encoder is None else {"ode_checkpoint": "encoder"}
    with fitting({**stage, **given}, keywords) as args:
        dataset = read_rows(rows, args, keywords)
        stage1 = None if encoder is None else read_encoder(encoder)
        model = TrajectoryModel.program.train_stage(args, dataset, stage1, trial)
    return model or TrajectoryModel.from_pretrained(stage_folder(args))


@contextlib.contextmanager
def fitting(
    stage: dict[str, Any], keywords: dict[str, Any], function: str = ""
) -> Iterator[Namespace]:
    """Check the keywords of a training, and yield its arguments for the length of it."""
    way, other = ("llm", "stage 1") if "mode" in stage else ("stage1", "stages 2 and 3")
    for name in sorted(keywords):
        tags = flags.FLAGS[name].tags if name in flags.FLAGS else frozenset()
        if not tags & {"keyword", function}:
            raise TypeError(f"unexpected keyword {name!r}")
        if way not in tags:
            hint = ": stage 1 takes trajectory_epochs" if name == "epochs" else ""
            raise TypeError(f"{name} is for {other}{hint}")
    unused = [name for name in flags.tagged("folder") if keywords.get(name)]
    if keywords.get("output_dir") is None and unused:
        raise InputError(f"{', '.join(unused)}: give output_dir too, or leave it out")
    if isinstance(keywords.get("encoder"), type):
        keywords = {**keywords, "encoder": register(keywords["encoder"])}
    set_environment()
    args, typed = TrajectoryModel.program.parser.parse_keywords({**keywords, **stage})
    flags.check_flags(flags.complete(args), typed)
    check_launch()
    check_gpu()
    with FITTING:  # a fit of another thread waits
        if IN_FIT.get():
            raise InputError("a model is being trained: on_epoch cannot train another")
        check_output(args)
        kernels = exact_kernels(deterministic=args.deterministic)
        within = IN_FIT.set(True)
        try:
            with SIGNALS.installed(kills=False), kernels, recorded(), owner_only():
                yield args
        except KeyboardInterrupt as stop:
            if args.output_dir:
                stop.add_note(f"resume=True continues the run in {args.output_dir}")
            raise
        finally:
            IN_FIT.reset(within)


def read_encoder(encoder: TrajectoryModel | str | Path) -> TrajectoryCheckpoint:
    """Return a trained stage 1 from a model, a path or a repository of the hub."""
    if isinstance(encoder, TrajectoryModel):
        return encoder.checkpoint()
    return read_trajectory(checkpoint_path(find_checkpoint(encoder, None)))


def read_rows(rows: Rows, args: Namespace, keywords: Mapping[str, Any]) -> TrajectoryDataset:
    """Read the rows of a training; return a data set as given."""
    source = as_source(rows)
    if not isinstance(source, TrajectoryDataset):
        return TrajectoryModel.program.read(args, source)
    if late := sorted(set(source.options) & keywords.keys()):
        raise InputError(f"the data set has been read: leave {', '.join(late)} out")
    args.dataset = source.name
    return source


def bind(program: Program) -> None:
    """Give the package what its script has; ``help`` shows the keywords of each function."""
    TrajectoryModel.program = program
    function: Any
    for function in (fit_trajectory, fit_classification, fit_generative):
        tags = {"keyword", "stage1" if function is fit_trajectory else "llm"}
        signature = inspect.signature(function)
        *arguments, rest = signature.parameters.values()
        keyword = partial(rest.replace, kind=rest.KEYWORD_ONLY, annotation=rest.empty)
        # ``encoder`` of stages 2 and 3 is more than the flag.
        names = [x for x in flags.tagged("keyword") if x not in signature.parameters]
        names = [x for x in names if tags <= flags.FLAGS[x].tags]
        arguments += [keyword(name=name, default=flags.FLAGS[name].default) for name in names]
        function.__signature__ = signature.replace(parameters=arguments)
