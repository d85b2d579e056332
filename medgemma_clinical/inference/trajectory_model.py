"""TrajectoryModel: a trained model of any stage, to be used from Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags
from torch import Tensor

from medgemma_clinical.data.scoring import ScoringRows
from medgemma_clinical.data.tables import Findings
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import exact_kernels, find_device
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.hub import find_checkpoint, push_model, save_model
from medgemma_clinical.inference.risk_over_time import risk_over_time
from medgemma_clinical.inference.scoring import (
    Scores,
    check_kind,
    describe_source,
    prediction_table,
    reports_of,
    score_rows,
    scoring_rows,
)
from medgemma_clinical.inference.serving import prompt_embeds
from medgemma_clinical.models.checkpoints import TrajectoryCheckpoint
from medgemma_clinical.models.language_model import (
    ATTENTIONS,
    DTYPES,
    INT8_REFUSED,
    QUANTIZATIONS,
)
from medgemma_clinical.models.trained_model import (
    Builders,
    TrainedModel,
    load_trained_model,
    read_metrics,
)

Rows = pd.DataFrame | str | os.PathLike[str] | TrajectoryDataset
"""Rows to score: a table in the format of the training data, its path, or a data set."""

BATCH_ROWS = {"trajectory": 256, "classification": 32, "generative": 32}
"""Rows a batch where the caller does not say."""

MEMORY_ROWS = {"trajectory": 20_000, "classification": 2_000, "generative": 2_000}
"""Rows of a file in memory at a time."""


def check_loading(
    quantization: str | None, precision: str | None, attention: str, batch_size: int | None
) -> None:
    """Check how a trained model shall be loaded; None leaves a choice to the checkpoint.

    Raises:
        InputError: naming the choices.
    """
    if quantization == "int8":
        raise InputError(f"quantization: {INT8_REFUSED}")
    for name, value, choices in (
        ("quantization", quantization, QUANTIZATIONS),
        ("precision", precision, DTYPES),
        ("attention", attention, ATTENTIONS),
    ):
        if value not in (None, *choices):
            raise InputError(f"{name} {value!r}: choose from {', '.join(choices)}")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise InputError(f"batch_size {batch_size!r}: give a whole number from 1")


class Program(NamedTuple):
    """What the script gives to this package, which never imports it.

    datasets: class of each kind of data by name; builders: of the models; fit: trains a stage from
    its flags, rows, encoder and keywords.
    """

    datasets: Mapping[str, Any]
    builders: Builders
    fit: Callable[..., TrajectoryModel]


class TrajectoryModel:
    """A trained model of stage 1, 2 or 3, in the manner of a fitted scikit-learn classifier.

    Import it from ``medgemma_trainer``; load a model by ``from_pretrained`` or train one by
    ``fit_trajectory`` and its like.

    Attributes:
        trained: network, tokenizer and configuration.
        metrics: the content of ``metrics.json``; None where it is not known.
        batch_size: rows a batch.
    """

    program: ClassVar[Program]
    _estimator_type = "classifier"

    def __init__(
        self,
        trained: TrainedModel,
        metrics: dict[str, Any] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Keep the parts; see the class."""
        self.trained = trained
        self.metrics = metrics
        self.batch_size = BATCH_ROWS[trained.config["stage"]] if batch_size is None else batch_size

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        revision: str | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        model_name: str | None = None,
        quantization: str | None = None,
        precision: str | None = None,
        attention: str = "sdpa",
    ) -> Self:
        """Load a trained model.

        Args:
            checkpoint: a run's stage folder, stage 1's ``.pt``, a folder of ``save_pretrained``, or
                the id of a hub repository, as in "user/name".
            revision: branch, tag or commit of a hub repository.
            device: as in ``torch.device``; None takes the GPU if there is one.
            batch_size: rows a batch; None takes 256 for stage 1 and 32 for the others.
            model_name: where the base model lies, if not where it lay in training.
            quantization: of the base model, "nf4" or "none"; None takes that of the training.
            precision: "bf16" or "fp32"; None takes that of the training.
            attention: "sdpa" or "eager", as in transformers.

        Raises:
            InputError: there is no trained model, or it cannot be loaded.
        """
        check_loading(quantization, precision, attention, batch_size)
        place = find_checkpoint(checkpoint, revision)
        trained = load_trained_model(
            place,
            cls.program.builders,
            model_name,
            quantization,
            precision,
            None if device is None else find_device(device),
            attention,
        )
        return cls(trained, read_metrics(place), batch_size)

    def __repr__(self) -> str:
        """Return stage, series, base model and data."""
        config = self.config
        base = config.get("merged_from", config).get("base_model")
        merged = ", its adapter merged" if "merged_from" in config else ""
        lines = [
            f"stage: {self.stage}",
            f"outcome: {config['outcome']}",
            f"series: {', '.join(config['features'])}",
            f"facts: {', '.join(config['inputs']['facts']) or 'none'}",
            *([f"base model: {base}{merged}"] if base else []),
            f"data: {config['dataset']}, SHA-256 {config['data_sha256'][:12]}",
            f"device: {self.trained.device}",
        ]
        return f"{type(self).__name__}({'; '.join(lines)})"

    # ------------------------------------------------------------------ what the model is

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's configuration."""
        return self.trained.config

    @property
    def stage(self) -> str:
        """``trajectory``, ``classification`` or ``generative``."""
        return str(self.config["stage"])

    @property
    def threshold(self) -> float:
        """The probability from which on ``predict`` says 1."""
        return self.trained.rule.threshold

    @property
    def classes_(self) -> NDArray[np.int64]:
        """The labels, in the order of ``predict_proba``'s columns."""
        return np.array([0, 1])

    def fit(self, rows: Rows, labels: Any = None) -> NoReturn:
        """Refuse: scikit-learn looks for this method on a classifier.

        Raises:
            ValueError: always, with the functions that train.
        """
        raise ValueError(
            "a trained model is not fitted again: fit_trajectory, fit_classification and "
            "fit_generative train a new one; scikit-learn takes this one within FrozenEstimator"
        )

    def __sklearn_is_fitted__(self) -> bool:
        """Return True: every ``TrajectoryModel`` is trained."""
        return True

    def __sklearn_tags__(self) -> Any:
        """Return the tags by which scikit-learn knows a classifier of two classes."""
        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(multi_class=False),
            input_tags=InputTags(two_d_array=False, string=True, allow_nan=True),
        )

    def results(self, part: str = "test") -> pd.DataFrame:
        """Return the figures of the model and of each baseline.

        Args:
            part: of the split, "test" or "validation".

        Returns:
            A row a model; auroc, auprc and brier, each with the ends of its 95 % interval, as in
            auroc_low and auroc_high. NaN where few patients stand behind a figure.

        Raises:
            ValueError: another part, or the run of the checkpoint was not finished.
        """
        figures = self.config.get("figures")
        if figures is None:
            raise ValueError("no figures: the run of this checkpoint was not finished")
        if part not in ("test", "validation"):
            raise ValueError(f"part {part!r}: choose test or validation")
        named = {self.stage: figures[part]}
        named |= {name: parts[part] for name, parts in figures["baselines"].items()}
        endings = {"value": "", "low": "_low", "high": "_high"}
        rows = {
            name: {
                f"{figure}{ending}": each[figure][key]
                for figure in ("auroc", "auprc", "brier")
                for key, ending in endings.items()
            }
            for name, each in named.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index", dtype=float)

    # ------------------------------------------------------------------ predictions

    @exact_kernels()
    def predict_proba(self, rows: Rows) -> NDArray[np.float64]:
        """Return the probabilities (N, 2) float64 of no event and of the event.

        Args:
            rows: a DataFrame or a file in the format of the training data, or a data set.

        Raises:
            InputError: a row cannot be scored; ``predictions`` scores the others.
        """
        events = np.concatenate([scores.probability for scores in self._scores(rows)])
        return np.stack([1 - events, events], axis=1)

    @exact_kernels()
    def predict(self, rows: Rows) -> NDArray[np.int64]:
        """Return the predictions (N,) int64 of 0 and 1 by the threshold kept with the weights.

        Args:
            rows: as for ``predict_proba``.

        Raises:
            InputError: a row cannot be scored.
        """
        return np.concatenate([scores.alarms for scores in self._scores(rows)]).astype(np.int64)

    @exact_kernels()
    def predictions(self, rows: Rows) -> pd.DataFrame:
        """Return the table of ``--predict``: a line for each row, with or without a score.

        Args:
            rows: as for ``predict_proba``.

        Returns:
            N lines: id, probability, prediction, of stage 3 report, and problem, which is empty for
            a row with a score and, in stage 3, a report of the expected form.

        Raises:
            InputError: the whole input cannot be read.
        """
        chunks, findings = self._read(rows, strict=False)
        tables = [
            prediction_table(chunk, self.trained, findings, self.batch_size)[0] for chunk in chunks
        ]
        return pd.concat(tables, ignore_index=True)

    @exact_kernels()
    def write_reports(self, rows: Rows) -> list[str]:
        """Return the report of each row, N texts; their verdicts are those of ``predict``.

        Args:
            rows: as for ``predict_proba``.

        Raises:
            ValueError: the model is not of stage 3.
            InputError: a row cannot be scored.
        """
        self._check_stage("generative", "write_reports")
        return [
            text
            for scores in self._scores(rows)
            for text in reports_of(scores, self.trained, self.batch_size)
        ]

    @exact_kernels()
    def risk_over_time(self, rows: Rows) -> pd.DataFrame:
        """Return the risk after each observation, as if the question were asked there.

        The model was trained on whole rows only, so that early risks can be miscalibrated.
        Facts and context are those of the whole row. In stages 2 and 3 each observation costs a
        call of the language model.

        Args:
            rows: as for ``predict_proba``.

        Returns:
            A line for each observation of each row, in order: id, hours (float64, on the row's
            clock), probability (float64). Where a row has a later prediction time, a line for that
            follows. The last probability of a row is that of ``predict_proba``.

        Raises:
            InputError: a row cannot be scored.
        """
        chunks, findings = self._read(rows, strict=True)
        tables = [
            table
            for chunk in chunks
            for table in risk_over_time(chunk, self.trained, findings, self.batch_size)
        ]
        return pd.concat(tables, ignore_index=True)

    @exact_kernels()
    def prompt_embeds(self, rows: Rows) -> list[Tensor]:
        """Return the language model's input of each row as vectors; see docs/serving.md.

        Args:
            rows: as for ``predict_proba``.

        Returns:
            N tensors (S, D) in the language model's dtype, on the CPU.

        Raises:
            InputError: the model is of stage 1, or a row cannot be scored.
        """
        return [
            vectors
            for scores in self._scores(rows)
            for vectors in prompt_embeds(scores, self.trained, self.batch_size)
        ]

    def _check_stage(self, needed: str, method: str) -> None:
        if self.stage != needed:
            raise ValueError(f"{method} needs a model of stage {needed}: this is {self.stage}")

    def _scores(self, rows: Rows) -> Iterator[Scores]:
        """Score rows, all of which can be scored, some at a time."""
        chunks, findings = self._read(rows, strict=True)
        for chunk in chunks:
            yield score_rows(chunk, self.trained, findings, self.batch_size)

    def _read(self, rows: Rows, *, strict: bool) -> tuple[Iterator[ScoringRows], Findings]:
        check_kind(rows)
        rows = Path(rows) if isinstance(rows, (str, os.PathLike)) else rows
        findings = Findings(describe_source(rows), strict=strict)
        most = MEMORY_ROWS[self.stage]
        return scoring_rows(rows, self.config, self.program.datasets, findings, most), findings

    # ------------------------------------------------------------------ keeping and sharing

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as a folder that ``from_pretrained`` reads, with its model card.

        Args:
            folder: new, or of an earlier model.

        Raises:
            InputError: the folder holds other files.
        """
        save_model(self.trained, Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        allow_small_cells: bool = False,
    ) -> str:
        """Upload the model with its card: never predictions, logs or ids; see docs/sharing.md.

        Args:
            repo_id: "user/name"; made where there is none.
            private: whether the repository must be private.
            revision: branch, made where there is none; None takes "main".
            commit_message: one line.
            token: of the hub; None takes that of the login.
            allow_small_cells: upload exact counts, and a model that reads a series or a static
                feature that fewer than 11 training patients have.

        Returns:
            Address of the commit.

        Raises:
            InputError: no right to write, a public repository where a private one is required, or
                few patients behind an input.
        """
        return push_model(
            self.trained,
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
            allow_small_cells=allow_small_cells,
        )

    def checkpoint(self) -> TrajectoryCheckpoint:
        """Return a trained stage 1 as stages 2 and 3 read it.

        Raises:
            ValueError: the model is not of stage 1.
        """
        self._check_stage("trajectory", "encoder")
        return self.trained.checkpoint()
