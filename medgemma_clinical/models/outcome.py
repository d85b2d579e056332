"""What differs between kinds of outcome: one object a kind; nothing else asks which it is.

Letters: B patients, N members, Q logits a patient, n rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation import decision, tables, verdicts
from medgemma_clinical.evaluation.baselines import ENSEMBLE
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import Metrics, evaluate
from medgemma_clinical.evaluation.time_table import (
    evaluate_times,
    time_sentences,
    time_table,
    uncensored_columns,
)
from medgemma_clinical.evaluation.topics.calibration import calibration_topic, updates
from medgemma_clinical.evaluation.topics.decision_curve import decision as decision_topic
from medgemma_clinical.evaluation.topics.discrimination import discrimination, model_comparison
from medgemma_clinical.evaluation.topics.instability import instability
from medgemma_clinical.evaluation.topics.subgroups import sites, subgroups
from medgemma_clinical.evaluation.topics.times import time_topics
from medgemma_clinical.evaluation.topics.topic import TopicBuilder
from medgemma_clinical.models.hazards import Hazards


def prior_log_odds(prevalence: float) -> float:
    """Return the log-odds of a share of events within (0, 1)."""
    return math.log(prevalence / (1 - prevalence))


class LabelOutcome:
    """An event, yes or no."""

    width: ClassVar[int] = 1  # Q
    config: ClassVar[dict[str, Any]] = {}  # keys of a checkpoint by which the kind is known again
    has_baselines: ClassVar[bool] = True
    topics: ClassVar[tuple[TopicBuilder, ...]] = (  # of a report on the risks, in their order
        discrimination,
        calibration_topic,
        updates,
        decision_topic,
        instability,
        model_comparison,
        subgroups,
        sites,
    )

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy (N,), a sum over B, of logits (N, B, 1) and labels (B,)."""
        logits = logits.squeeze(2)
        expanded = targets.expand_as(logits)
        losses = functional.binary_cross_entropy_with_logits(logits, expanded, reduction="none")
        return losses.sum(dim=1)

    def start(self, targets: Array) -> Array:
        """Return the logit (1,) that is the same for everyone and fits labels (n,)."""
        return np.array([prior_log_odds(float(targets.mean()))])

    def shift(self, predictions: decision.Predictions, targets: Array) -> Array:
        """Return what makes the logits fit labels (n,) on average, (1,)."""
        fits = decision.fit_updates(targets, predictions.probability)
        return np.array([fits[decision.INTERCEPT][1]])

    def read(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the log-odds (B,) of the event for logits (B, 1), and no hazards."""
        return logits.squeeze(1), None

    def decide(
        self, predictions: decision.Predictions, patients: NDArray[Any], options: Any
    ) -> decision.DecisionRule:
        """Fit recalibration and threshold to rows that the model did not learn from."""
        return decision.fit_decision_rule(predictions.labels, predictions.logit, patients, options)

    def observed(
        self, dataset: TrajectoryDataset, rows: NDArray[np.int64], censoring: str, seed: int
    ) -> dict[str, Any]:
        """Return the columns of a table of predictions that say what happened."""
        return {"label": dataset.labels[rows].astype(int)}

    def risks(self, name: str, predictions: decision.Predictions) -> dict[str, Array]:
        """Return the columns of a table of predictions that hold the risks of a model."""
        return {name: predictions.probability}

    def evaluate(self, table: pd.DataFrame, seed: int, *rule: Any, **plan: Any) -> Metrics:
        """Return the metrics of a table of predictions."""
        return evaluate(table, seed, *rule, **plan)

    def sentences(self, metrics: Metrics, *words: str) -> list[verdicts.Finding]:
        """Return metrics in words; ``words`` are those of ``verdicts.sentences``."""
        return verdicts.sentences(metrics, *words)

    def table(self, metrics: Metrics) -> pd.DataFrame:
        """Return metrics as a table of text."""
        return tables.model_table(metrics)

    def columns(
        self, risk: Array, hazards: Array | None, rule: decision.DecisionRule
    ) -> dict[str, Any]:
        """Return the columns of ``--predict`` for n rows of this risk."""
        positive = rule.positive(risk).astype(np.int64)
        return {"probability": risk, "prediction": pd.array(positive, dtype="Int64")}

    def recommend(self, table: pd.DataFrame, stage: str, names: Sequence[str]) -> dict[str, str]:
        """Return ``best_model``, that of ``--use best``, by predictions of held-out rows."""
        names = [name for name in table.columns if name in (stage, *names)]
        risks = {name: table[name].to_numpy(float) for name in names}
        labels, patients = table["label"].to_numpy(float), table["patient"].to_numpy(str)
        best = decision.recommended_model(labels, risks, patients, [ENSEMBLE, stage])
        return {"best_model": best}


@dataclass(frozen=True)
class TimeOutcome:
    """Times to events that compete."""

    hazards: Hazards
    has_baselines: ClassVar[bool] = False

    @property
    def topics(self) -> tuple[TopicBuilder, ...]:
        """Sections of a report on the risks, in their order."""
        return time_topics(self.hazards.events)

    @property
    def width(self) -> int:
        """Q."""
        return self.hazards.width

    @property
    def config(self) -> dict[str, Any]:
        """Keys of a checkpoint by which the kind is known again."""
        return {"events": self.hazards.config}

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss (N,), a sum over B, of outputs (N, B, Q) and ``TARGETS`` (B, 3)."""
        return self.hazards.loss(logits, targets)

    def start(self, targets: Array) -> Array:
        """Return the logits (Q,) that are the same for everyone and fit ``TARGETS`` (n, 3)."""
        return self.hazards.start(targets)

    def shift(self, predictions: decision.Predictions, targets: Array) -> Array:
        """Return what makes the hazards fit ``TARGETS`` (n, 3) on average, (Q,)."""
        assert predictions.hazards is not None
        return self.hazards.shift(predictions.hazards, targets)

    def read(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the log-odds (B,) float64 of the first risk for logits (B, Q), and these."""
        return torch.logit(self.hazards.risks(logits.double())[:, 0], eps=1e-12), logits

    def decide(
        self, predictions: decision.Predictions, patients: NDArray[Any], options: Any
    ) -> decision.DecisionRule:
        """Return the rule that leaves the risks as they are."""
        return decision.DecisionRule()

    def observed(
        self, dataset: TrajectoryDataset, rows: NDArray[np.int64], censoring: str, seed: int
    ) -> dict[str, Any]:
        """Return the columns of a table of predictions that say what happened."""
        assert dataset.events is not None
        assert dataset.event_hours is not None
        columns = {"event_hours": dataset.event_hours[rows], "event": dataset.events[rows]}
        return columns | uncensored_columns(
            self.hazards.events, dataset.subset(rows), censoring, seed
        )

    def risks(self, name: str, predictions: decision.Predictions) -> dict[str, Array]:
        """Return the columns of a table of predictions that hold the risks of a model."""
        assert predictions.hazards is not None
        risks = self._risks(predictions.hazards)
        return {name: predictions.probability, **{f"{name} {k}": x for k, x in risks.items()}}

    def _risks(self, hazards: Array) -> dict[str, Array]:
        risks = self.hazards.risks(torch.from_numpy(hazards)).numpy().T
        return dict(zip(self.hazards.events.risk_names, risks, strict=True))

    def evaluate(
        self,
        table: pd.DataFrame,
        seed: int,
        threshold: float | None = None,
        primary: str | None = None,
    ) -> Metrics:
        """Return the metrics of a table of predictions at each horizon."""
        return evaluate_times(table, self.hazards.events, seed)

    def sentences(self, metrics: Metrics, *words: str) -> list[verdicts.Finding]:
        """Return metrics in words."""
        return time_sentences(metrics, self.hazards.events, *words[1:2])

    def table(self, metrics: Metrics) -> pd.DataFrame:
        """Return metrics as a table of text."""
        return time_table(metrics, self.hazards.events)

    def columns(
        self, risk: Array, hazards: Array | None, rule: decision.DecisionRule
    ) -> dict[str, Any]:
        """Return the columns of ``--predict`` for n rows of these hazards (n, Q)."""
        assert hazards is not None
        return {"probability": risk, **self._risks(hazards)}

    def recommend(self, table: pd.DataFrame, stage: str, names: Sequence[str]) -> dict[str, str]:
        """Return nothing: there is no other model yet."""
        return {}


Outcome = LabelOutcome | TimeOutcome
LABEL = LabelOutcome()


def fit_outcome(data: Data) -> Outcome:
    """Return the outcome of a data set, its cut points chosen on the training part."""
    dataset = data.dataset
    if dataset.competing_events is None:
        return LABEL
    return TimeOutcome(
        Hazards.fitted(dataset.competing_events, dataset.targets()[data.split["train"]])
    )


def outcome_of(config: Mapping[str, Any]) -> Outcome:
    """Return the outcome that a checkpoint's configuration describes."""
    if "events" not in config:
        return LABEL
    return TimeOutcome(Hazards.from_config(config["events"]))
