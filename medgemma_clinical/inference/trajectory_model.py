"""TrajectoryModel: a trained model of any stage, to be used from Python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.utils import ClassifierTags, Tags, TargetTags
from torch import Tensor

from medgemma_clinical.data.dka import Meaning
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.table_files import ArrowTable
from medgemma_clinical.data.trajectories import ScoringRows, TrajectoryDataset
from medgemma_clinical.distributed import exact_kernels, find_device, set_environment
from medgemma_clinical.evaluation import patients
from medgemma_clinical.evaluation.metrics_table import DIFFERENCE, VALUE, Metrics
from medgemma_clinical.evaluation.plots import plot_style
from medgemma_clinical.evaluation.target import Target
from medgemma_clinical.files import InputError
from medgemma_clinical.inference import explain, hub, scoring, serving
from medgemma_clinical.models.checkpoints import Config, TrajectoryCheckpoint
from medgemma_clinical.models.choices import ATTENTIONS, PRECISIONS, QUANTIZATIONS
from medgemma_clinical.models.encoders import register
from medgemma_clinical.models.trained_model import Builders, TrainedModel, load_trained_model

Rows = pd.DataFrame | ArrowTable | str | os.PathLike[str] | TrajectoryDataset
"""Rows to score: a table in the format of the training data, its path, or a data set."""

BATCH_ROWS = {"trajectory": 256, "classification": 32, "generative": 32}
"""Rows a batch where the caller does not say."""

MEMORY_ROWS = {"trajectory": 20_000, "classification": 2_000, "generative": 2_000}
"""Rows of a file in memory at a time."""

RESULTS = ("auroc", "auprc", "brier", "oe", "slope")
"""Metrics of ``TrajectoryModel.results``."""


def results_table(content: Mapping[str, Any], part: str) -> pd.DataFrame:
    """Return a part of ``metrics.json`` as ``TrajectoryModel.results`` describes it."""
    tables: dict[str, pd.DataFrame] = {}
    for stored in content["targets"]:
        target = Target.from_json(stored)
        metrics = Metrics.from_json(content[part]).at(target)
        table = metrics.metric("auroc")[DIFFERENCE]
        for name in reversed(RESULTS):
            values = metrics.metric(name)[VALUE]
            values.columns = [name, f"{name}_low", f"{name}_high"]
            table = values.join(table)
        tables[target.name] = table.loc[metrics.models].rename_axis(index=None)
    joined = table if len(tables) == 1 else pd.concat(tables, names=["risk"])
    return joined.rename_axis(columns=part)


class TrajectoryModel:
    """A trained model of stage 1, 2 or 3, in the manner of a fitted scikit-learn classifier.

    Import it from ``medgemma_trainer``; load a model by ``from_pretrained`` or train one by
    ``fit_trajectory`` and its like. In all methods ``rows`` are N rows: a table (a DataFrame, or
    one of polars or pyarrow) or the path of a file in the format of the training data, or a data
    set. ``description`` says what series and label of a table are: a ``Description``, its JSON as
    a dict, or the path of the JSON or of the file beside it; without one they are taken for those
    of the training data. A row that cannot be scored raises ``InputError``; ``predictions`` alone
    lists it.

    Attributes:
        trained: network, tokenizer and configuration.
        batch_size: rows a batch.
    """

    builders: ClassVar[Builders]  # the script sets both
    datasets: ClassVar[Mapping[str, Any]]  # class of each kind of data by name

    def __init__(self, trained: TrainedModel, batch_size: int | None = None) -> None:
        self.trained = trained
        self.batch_size = BATCH_ROWS[self.stage] if batch_size is None else batch_size

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
        encoder: type | str | None = None,
        text_model: str | None = None,
    ) -> Self:
        """Load a trained model.

        Args:
            checkpoint: a run's stage folder, stage 1's ``.pt``, a folder of ``save_pretrained``, or
                the id of a hub repository, as in "user/name".
            revision: branch, tag or commit of a hub repository.
            device: as in ``torch.device``; None takes the GPU if there is one.
            batch_size: rows a batch; None takes 256 for stage 1 and 32 for the others.
            model_name: path of the base model, if it has moved since the training.
            quantization: of the base model, "nf4" or "none"; None takes that of the training.
            precision: "bf16" or "fp32"; None takes that of the training.
            attention: "sdpa" or "eager", as in transformers.
            encoder: class of your own that it was trained with, which no checkpoint can import.
            text_model: path of the language encoder of ``--text_features frozen``, if it has moved.

        Raises:
            InputError: there is no trained model, or it cannot be loaded.
        """
        for name, value, choices in (
            ("quantization", quantization, QUANTIZATIONS),
            ("precision", precision, PRECISIONS),
            ("attention", attention, ATTENTIONS),
        ):
            if value not in (None, *choices):
                raise InputError(f"{name} {value!r}: choose from {', '.join(choices)}")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size {batch_size}: at least 1")
        set_environment()
        if encoder is not None:
            register(encoder)
        trained = load_trained_model(
            hub.find_checkpoint(checkpoint, revision),
            cls.builders,
            model_name,
            quantization,
            precision,
            None if device is None else find_device(device),
            attention,
            text_model,
        )
        return cls(trained, batch_size)

    def __repr__(self) -> str:
        """Return stage, series, base model and data."""
        config = self.config
        base = config.get("merged_from", config).get("base_model") or "no language model"
        series = ", ".join(config["inputs"].get("series", config["features"]))
        data = f"{config['dataset']} {config['data_sha256']}"
        return f"{type(self).__name__}({self.stage}; {config['outcome']}; {series}; {base}; {data})"

    @property
    def config(self) -> Config:
        """The checkpoint's configuration."""
        return self.trained.config

    @property
    def stage(self) -> str:
        """``trajectory``, ``classification`` or ``generative``."""
        return str(self.config["stage"])

    @property
    def threshold(self) -> float:
        """The probability from which on ``predict`` returns 1."""
        return self.trained.threshold(self.trained.name)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The content of ``metrics.json``; None where the model was not tested."""
        return self.config.get("metrics")

    def results(self, part: str | None = None) -> pd.DataFrame:
        """Return the metrics of the model and of each baseline on a part.

        Args:
            part: "test", "validation", or "folds" of a model of ``--final``; None takes the first
                of "test", "folds" and "validation" that there is.

        Returns:
            A row a model, the model itself first; of times the index is the risk, then the model.
            ``columns.name`` is the part. Columns auroc, auprc, brier, oe (observed over expected
            events), slope of the calibration, with the ends of their 95 % intervals, as in
            auroc_low and auroc_high; difference, difference_low and difference_high of the AUROC,
            the row's minus the model's (of "ensemble", minus that of the best blend). NaN where a
            metric is undefined; slopes of other models have no interval.

        Raises:
            ValueError: another part, or the model was not tested.
        """
        if self.metrics is None:
            raise ValueError("no metrics: this model was not tested")
        parts = [name for name in ("test", "folds", "validation") if name in self.metrics]
        if part not in (None, *parts):
            raise ValueError(f"part {part!r}: choose from {', '.join(parts)}")
        return results_table(self.metrics, part or parts[0])

    @property
    def classes_(self) -> NDArray[np.int64]:
        """The labels, in the order of ``predict_proba``'s columns."""
        return np.array([0, 1])

    def fit(self, rows: Rows, labels: Any = None) -> NoReturn:
        """Refuse; scikit-learn expects this method of a classifier."""
        raise ValueError("a trained model is not fitted again: wrap it in FrozenEstimator")

    def __sklearn_is_fitted__(self) -> bool:
        """Return True."""
        return True

    def __sklearn_tags__(self) -> Tags:
        """Return the tags by which scikit-learn knows a classifier of two classes."""
        return Tags(
            "classifier",
            TargetTags(required=True),
            classifier_tags=ClassifierTags(multi_class=False),
        )

    @exact_kernels()
    def predict_proba(
        self, rows: Rows, model: str = "stage", *, description: Meaning | None = None
    ) -> NDArray[np.float64]:
        """Return the probabilities (N, 2) float64 of no event and of the event.

        ``model``: "stage"; "best", the recommended one, if there is one; "ensemble" or a baseline,
        by its name in ``results`` or the end of its column in ``predictions``.
        """
        chunks = self._scores(rows, model, description)
        events = np.concatenate([scores.probability for scores in chunks])
        return np.stack([1 - events, events], axis=1)

    @exact_kernels()
    def predict(
        self, rows: Rows, model: str = "stage", *, description: Meaning | None = None
    ) -> NDArray[np.int64]:
        """Return the predictions (N,) int64 of 0 and 1 by the threshold kept with the weights.

        ``model``: as for ``predict_proba``, with its own threshold.
        """
        chunks = self._scores(rows, model, description)
        return np.concatenate([scores.positive for scores in chunks]).astype(np.int64)

    @exact_kernels()
    def predict_cumulative_incidence(
        self,
        rows: Rows,
        hours: Sequence[float] | None = None,
        model: str = "stage",
        *,
        description: Meaning | None = None,
    ) -> pd.DataFrame:
        """Return how likely each event is by some hours, while the others compete with it.

        Args:
            rows: N rows.
            hours: H numbers of hours from the prediction time, from 0 to the last horizon; None
                takes the ends of the intervals in which the model has hazards.
            model: as for ``predict_proba``.
            description: of a table.

        Returns:
            N x C x H lines: id, hour (float64), cause (name of the event), incidence (float64).

        Raises:
            InputError: the model was trained on a label.
            ValueError: an hour is below 0 or beyond the last horizon.

        Source: Aalen and Johansen 1978, of the model's hazards.
        """
        chunks = self._scores(rows, model, description)
        return pd.concat([scores.curves(hours) for scores in chunks], ignore_index=True)

    @exact_kernels()
    def predictions(
        self, rows: Rows, model: str = "stage", *, description: Meaning | None = None
    ) -> pd.DataFrame:
        """Return the table of ``predict``: N rows, with or without a score.

        Columns id, probability, prediction, of stage 3 report, problem, which is empty for a row
        with a score and, in stage 3, a report of the expected form, and probability_NAME of each
        other model. Times to events have further columns; see docs/times.md. ``model``: as for
        ``predict_proba``.
        """
        chunks, findings = self._read(rows, description, strict=False)
        tables = []
        for chunk in chunks:
            table, _ = scoring.prediction_table(
                chunk, self.trained, findings, self.batch_size, model
            )
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    @exact_kernels()
    def write_reports(self, rows: Rows, *, description: Meaning | None = None) -> list[str]:
        """Return the reports of stage 3, N texts; their verdicts are those of ``predict``."""
        if self.stage != "generative":
            raise ValueError(f"write_reports needs a model of stage generative: {self.stage}")
        texts: list[str] = []
        for scores in self._scores(rows, "stage", description):
            reports = scoring.reports_of(scores, self.batch_size)
            texts += scoring.with_risks(reports, scores)
        return texts

    @exact_kernels()
    def risk_over_time(self, rows: Rows, *, description: Meaning | None = None) -> pd.DataFrame:
        """Return the risk after each observation, as if the prediction were made there.

        Early risks rest on fewer values, and a language model has learned from whole rows only.
        Static features and context are those of the whole row. A language model is called once an
        observation.

        Returns:
            A line for each observation of each row, in order, and one for a later prediction time:
            id, hours (float64, on the row's clock), probability (float64), the last of which is
            that of ``predict_proba``.
        """
        chunks, findings = self._read(rows, description, strict=True)
        tables: list[pd.DataFrame] = []
        for chunk in chunks:
            tables += explain.risk_over_time(chunk, self.trained, findings, self.batch_size)
        return pd.concat(tables, ignore_index=True)

    def plot_risk(self, rows: Rows, *, description: Meaning | None = None) -> Figure:
        """Return a figure of ``risk_over_time``, a line for each row."""
        curves = self.risk_over_time(rows, description=description)
        with plot_style():
            return patients.plot_risk_curves(curves, self.config["outcome"], self.threshold)

    @exact_kernels()
    def plot_patient(
        self, rows: Rows, id: object = None, *, description: Meaning | None = None
    ) -> Figure:
        """Return the figure of the patients' page: a row's series and, below, its risk over time.

        Args:
            rows: N rows, of which one is drawn.
            id: of the row, as in ``predictions``; None draws the first one that has a value.
            description: of a table.

        Raises:
            InputError: the row cannot be scored.
            ValueError: no row has this id.
        """
        chunks, findings = self._read(rows, description, strict=False)
        problem = ""
        for chunk in chunks:
            scorable = scoring.rows_as_read(chunk, self.config, findings)
            is_asked = (scorable.ids == str(id)) | (id is None)
            position = np.flatnonzero(is_asked[scorable.positions])[:1]
            if len(position):
                name = scorable.ids[scorable.positions[position[0]]]
                row = {"id": name, "probability": np.nan, "problem": ""}
                dataset = scorable.dataset.subset(position)
                explanation = explain.explain(row, dataset, self.trained, self.batch_size)
                outcome = self.config["outcome"]
                with plot_style():
                    return patients.plot_patient(explanation, outcome, self.threshold)[0]
            for number in scorable.numbers[is_asked][:1].tolist():
                problem = f"{findings.source}, row {number}: {findings.problems[number]}"
        if problem:
            raise InputError(problem)
        raise ValueError(f"no row has the id {id}")

    @exact_kernels()
    def prompt_embeds(self, rows: Rows, *, description: Meaning | None = None) -> list[Tensor]:
        """Return the language model's input, N tensors (S, D) on the CPU; see docs/sharing.md."""
        prompts: list[Tensor] = []
        for scores in self._scores(rows, "stage", description):
            prompts += serving.prompt_embeds(scores, self.batch_size)
        return prompts

    def _scores(
        self, rows: Rows, model: str, description: Meaning | None
    ) -> Iterator[scoring.Scores]:
        chunks, findings = self._read(rows, description, strict=True)
        for chunk in chunks:
            yield scoring.score_rows(chunk, self.trained, findings, self.batch_size, model)

    def _read(
        self, rows: Rows, description: Meaning | None, *, strict: bool
    ) -> tuple[Iterator[ScoringRows], Findings]:
        source = scoring.as_source(rows)
        if isinstance(source, TrajectoryDataset):
            name = source.source
        else:
            name = "DataFrame" if isinstance(source, pd.DataFrame) else str(source)
        findings = Findings(name, strict, "; predictions(rows) lists such rows and scores the rest")
        chunks = scoring.scoring_rows(
            source, self.config, self.datasets, findings, MEMORY_ROWS[self.stage], description
        )
        return chunks, findings

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the model, with its card, as a folder of your own: new, or of an earlier model.

        Identifiers and outcomes of training patients can be recovered from it: give away a copy of
        ``save_shared``.
        """
        hub.save_model(self.trained, Path(folder))

    def save_shared(
        self,
        folder: str | os.PathLike[str],
        *,
        allow_small_cells: bool = False,
        share_text: bool = False,
    ) -> None:
        """Write the files that ``push_to_hub`` uploads as a folder: new, or of an earlier model."""
        hub.shared_copy(self.trained, Path(folder), allow_small_cells, share_text)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        allow_small_cells: bool = False,
        share_text: bool = False,
    ) -> str:
        """Upload the model with its card: never predictions, logs or ids; see docs/sharing.md.

        Args:
            repo_id: "user/name"; created if missing.
            private: whether the repository must be private.
            revision: branch, created if missing; None takes "main".
            commit_message: one line.
            token: of the hub; None takes that of the login.
            allow_small_cells: upload exact counts, and a model that reads prediction times which
                fewer than 11 training patients have.
            share_text: upload regressions on texts, whose words patients' texts hold; those of
                fewer than 11 training patients are not among them.

        Returns:
            Address of the commit.
        """
        return hub.push_model(
            self.trained,
            repo_id,
            private,
            revision,
            commit_message,
            token,
            allow_small_cells,
            share_text,
        )

    def checkpoint(self) -> TrajectoryCheckpoint:
        """Return a trained stage 1 as stages 2 and 3 read it."""
        if self.stage != "trajectory":
            raise ValueError(f"an encoder is a model of stage trajectory: this is {self.stage}")
        return self.trained.checkpoint()
