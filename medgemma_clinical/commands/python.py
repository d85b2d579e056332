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
from functools import partial, wraps
from pathlib import Path
from typing import Any, cast

import pandas as pd

from medgemma_clinical.commands.command_line import EXIT_DONE, Table, build_parser, rows_of
from medgemma_clinical.commands.flags import check_flags
from medgemma_clinical.commands.folds import run_folds
from medgemma_clinical.commands.logs import recorded
from medgemma_clinical.commands.plan import active_cluster
from medgemma_clinical.commands.prediction_files import FOLDS, read_rows
from medgemma_clinical.commands.run_folder import METRICS, folds_folder, stage_folder
from medgemma_clinical.commands.run_log import check_output
from medgemma_clinical.data.dka import Meaning
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import check_gpu, check_launch, exact_kernels, set_environment
from medgemma_clinical.files import InputError, did_you_mean, owner_only, read_json
from medgemma_clinical.inference.hub import find_checkpoint
from medgemma_clinical.inference.scoring import as_source
from medgemma_clinical.inference.trajectory_model import Rows, TrajectoryModel, results_table
from medgemma_clinical.models.checkpoints import TrajectoryCheckpoint, read_trajectory
from medgemma_clinical.models.encoders import register
from medgemma_clinical.models.language_model import check_compiler, machine_defaults
from medgemma_clinical.models.trained_model import checkpoint_path
from medgemma_clinical.training.signals import SIGNALS

COMMAND_LINE_ALONE = {"trajectory_only", "mode", "ablation", "seeds", "only_fold", "dry_run"}
COMMAND_LINE_ALONE |= {"data_path", "data_dir", "show_values", "folds", "leave_out", "final"}
COMMAND_LINE_ALONE |= {"ode_checkpoint"}
"""Flags that are no keywords."""

OF_FOLDS = {"folds", "leave_out", "final"}
"""Those of them that ``cross_validate`` takes."""

OF_FOLDER = ("report_patients", "log_file", "report_to", "resume", "save_every")
"""Keywords that need ``output_dir``."""

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


@dataclass(frozen=True)
class Training:
    """The functions of Python, on what the script has: flags, reading, training."""

    model: type[TrajectoryModel]
    table: Table
    read: Callable[..., TrajectoryDataset]  # of arguments, a source and a description
    train_stage: Callable[..., TrajectoryModel | None]  # of arguments, data, a stage 1 and a trial
    train: Callable[[Namespace, TrajectoryDataset], int]  # returns an exit code

    def fit_trajectory(
        self,
        rows: Rows,
        *,
        description: Meaning | None = None,
        test: bool = True,
        baselines: bool = True,
        on_epoch: Callable[[dict[str, Any]], Any] | None = None,
        **flags: Any,
    ) -> TrajectoryModel:
        """Train stage 1: encoder and head, no language model.

        Args:
            rows: a table (a DataFrame, or one of polars or pyarrow) or a file in the DKA format, or
                a data set.
            description: what series and label of the rows are: a ``Description``, its JSON as a
                dict, or the path of the JSON or of the table beside it; None reads the JSON beside
                a file.
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
        trial = Trial(test, baselines, on_epoch)
        return self._fit({"trajectory_only": True}, rows, description, None, flags, trial)

    def fit_classification(
        self,
        rows: Rows,
        encoder: TrajectoryModel | type | str | Path | None = None,
        *,
        description: Meaning | None = None,
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
            description: as for ``fit_trajectory``, with the next three.
            test: see ``description``.
            baselines: see ``description``.
            on_epoch: see ``description``.
            **flags: as for ``fit_trajectory``, such as ``model_name``, ``epochs``, ``lora_rank``.

        Returns:
            The trained model; ``results()`` gives its metrics.

        Raises:
            TypeError: there is no such flag.
            InputError: a flag, the data, stage 1 or the language model are wrong.
        """
        trial = Trial(test, baselines, on_epoch)
        return self._fit({"mode": "classification"}, rows, description, encoder, flags, trial)

    def fit_generative(
        self,
        rows: Rows,
        encoder: TrajectoryModel | type | str | Path | None = None,
        *,
        description: Meaning | None = None,
        test: bool = True,
        baselines: bool = True,
        on_epoch: Callable[[dict[str, Any]], Any] | None = None,
        **flags: Any,
    ) -> TrajectoryModel:
        """Train stage 3: MedGemma reads soft prompt and text, and writes a verdict with a report.

        Arguments, result and errors are those of ``fit_classification``.
        """
        trial = Trial(test, baselines, on_epoch)
        return self._fit({"mode": "generative"}, rows, description, encoder, flags, trial)

    def cross_validate(
        self,
        rows: Rows,
        folds: int = 5,
        stage: str = "trajectory",
        encoder: type | str | os.PathLike[str] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        *,
        description: Meaning | None = None,
        **flags: Any,
    ) -> CrossValidation:
        """Score every patient by a model that was trained on the others, in folds of patients.

        Metrics that compare risks are means over the folds, each with the interval of a bootstrap
        of the patients; baselines are fitted on the same folds.

        Args:
            rows: as for ``fit_trajectory``; a column ``split`` is not read.
            folds: number of parts into which the patients are split, stratified by the event.
            stage: "trajectory", "classification" or "generative".
            encoder: of the other stages: path of each fold's trained stage 1, ``{fold}`` in place
                of the fold's number. Or a class of your own for new ones.
            output_dir: run folder; the same call goes on there after a stop. None keeps nothing.
            description: as for ``fit_trajectory``.
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
            if output_dir is None and (cluster := active_cluster()):
                raise InputError(f"output_dir: give a folder that the workers of {cluster} share")
            if output_dir is None:
                temporary = stack.enter_context(tempfile.TemporaryDirectory())
                keywords |= {"output_dir": temporary, "log_file": "none"}
            args = stack.enter_context(self._fitting(chosen, keywords, for_folds=True))
            read = partial(self._read_rows, rows, description, keywords)
            if run_folds(args, read, self.train) == EXIT_DONE:
                folder = folds_folder(args)
                return CrossValidation(read_rows(folder / FOLDS), read_json(folder / METRICS))
        raise KeyboardInterrupt

    def with_flags(self, function: Callable[..., Any], way: str) -> Callable[..., Any]:
        """Return a function whose signature, which ``help`` shows, names the flags it takes."""

        @wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            return function(*args, **keywords)

        signature = inspect.signature(function)
        *arguments, rest = signature.parameters.values()
        for flag in rows_of(self.table):
            listed = {*COMMAND_LINE_ALONE, *signature.parameters}  # ``encoder`` is more than a flag
            if flag.name not in listed and way not in flag.unread.split():
                row = rest.replace(name=flag.name, kind=rest.KEYWORD_ONLY, default=flag.default)
                arguments.append(row.replace(annotation=rest.empty))
        cast(Any, call).__signature__ = signature.replace(parameters=arguments)
        return call

    def _fit(
        self,
        stage: dict[str, Any],
        rows: Rows,
        description: Meaning | None,
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
        with self._fitting({**stage, **given}, keywords) as args:
            dataset = self._read_rows(rows, description, keywords, args)
            stage1 = None if encoder is None else read_encoder(encoder)
            model = self.train_stage(args, dataset, stage1, trial)
        return model or self.model.from_pretrained(stage_folder(args))

    @contextlib.contextmanager
    def _fitting(
        self, stage: dict[str, Any], keywords: dict[str, Any], *, for_folds: bool = False
    ) -> Iterator[Namespace]:
        """Check the keywords of a training, and yield its arguments for the length of it."""
        self._check_names(keywords, for_folds=for_folds)
        self._check_stage(keywords, has_llm="mode" in stage)
        unused = [name for name in OF_FOLDER if keywords.get(name)]
        if keywords.get("output_dir") is None and unused:
            raise InputError(f"{', '.join(unused)}: give output_dir too, or leave it out")
        if isinstance(keywords.get("encoder"), type):
            keywords = {**keywords, "encoder": register(keywords["encoder"])}
        set_environment()
        parser = build_parser("medgemma_trainer.py", "", self.table)
        args, typed = parser.parse_keywords({**keywords, **stage})
        check_flags(args, typed, self.table)
        args.quantization, args.precision = machine_defaults(
            args.model_name, args.base_weights, args.quantization, args.precision
        )
        check_launch()
        check_gpu()
        if args.compile_layers:
            check_compiler()
        with FITTING:  # a fit of another thread waits
            if IN_FIT.get():
                raise InputError("a model is being trained: on_epoch cannot train another")
            check_output(stage_folder(args), args.log_file, args.report_to)
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

    def _check_names(self, keywords: Mapping[str, Any], *, for_folds: bool) -> None:
        """Refuse keywords that are no flags of a training, or of one without folds."""
        names = {flag.name for flag in rows_of(self.table)} - COMMAND_LINE_ALONE
        if for_folds:
            names |= {*OF_FOLDS, "ode_checkpoint"}
        for name in sorted({*keywords} - names):
            if name in OF_FOLDS:
                raise TypeError(f"{name!r}: cross_validate takes it")
            raise TypeError(f"unexpected keyword {name!r}{did_you_mean(name, [*names])}")

    def _check_stage(self, keywords: Mapping[str, Any], *, has_llm: bool) -> None:
        """Refuse flags of another stage."""
        way, other = ("llm", "stage 1") if has_llm else ("stage1", "stages 2 and 3")
        flags = {flag.name: flag for flag in rows_of(self.table)}
        for name in sorted(keywords):
            if way in flags[name].unread.split():
                hint = ": stage 1 takes trajectory_epochs" if name == "epochs" else ""
                raise TypeError(f"{name} is for {other}{hint}")

    def _read_rows(
        self,
        rows: Rows,
        description: Meaning | None,
        keywords: Mapping[str, Any],
        args: Namespace,
    ) -> TrajectoryDataset:
        """Read the rows of a training; return a data set as given."""
        source = as_source(rows)
        if not isinstance(source, TrajectoryDataset):
            return self.read(args, source, description)
        given = {*keywords} if description is None else {*keywords, "description"}
        if late := sorted({"description", *source.options} & given):
            raise InputError(f"the data set has been read: leave {', '.join(late)} out")
        args.dataset = source.name
        return source


def read_encoder(encoder: TrajectoryModel | str | Path) -> TrajectoryCheckpoint:
    """Return a trained stage 1 from a model, a path or a repository of the hub."""
    if isinstance(encoder, TrajectoryModel):
        return encoder.checkpoint()
    return read_trajectory(checkpoint_path(find_checkpoint(encoder, None)))
