"""What differs between kinds of outcome: one object a kind; nothing else asks which it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from torch.nn import functional

from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import Metrics, evaluate
from medgemma_clinical.evaluation.topics.calibration import calibration_topic, updates
from medgemma_clinical.evaluation.topics.decision_curve import decision
from medgemma_clinical.evaluation.topics.discrimination import discrimination, model_comparison
from medgemma_clinical.evaluation.topics.instability import instability
from medgemma_clinical.evaluation.topics.subgroups import sites, subgroups
from medgemma_clinical.evaluation.topics.topic import TopicBuilder


@dataclass(frozen=True)
class Outcome:
    """A kind of outcome."""

    loss: Callable[[Tensor, Tensor], Tensor]  # of logits (N, B) and targets (B,): (N,), summed
    evaluate: Callable[..., Metrics]  # a table of predictions, and how: its metrics
    topics: tuple[TopicBuilder, ...]  # sections of a report on the risks, in their order
    columns: Callable[[Array, DecisionRule], dict[str, Any]]  # of predictions: (n,) risk and rule


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy (N,), a sum over B, of logits (N, B) and labels (B,)."""
    targets = labels.expand_as(logits)
    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.sum(dim=1)


def label_columns(risk: Array, rule: DecisionRule) -> dict[str, Any]:
    """Return probability and prediction of n rows."""
    positive = rule.positive(risk).astype(np.int64)
    return {"probability": risk, "prediction": pd.array(positive, dtype="Int64")}


LABEL = Outcome(
    cross_entropy,
    evaluate,
    (
        discrimination,
        calibration_topic,
        updates,
        decision,
        instability,
        model_comparison,
        subgroups,
        sites,
    ),
    label_columns,
)

OUTCOMES = {"label": LABEL}
"""By ``TrajectoryDataset.outcome_kind``."""
