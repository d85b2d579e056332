"""Predictions: what a model says about the rows of one part of the data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from medgemma_clinical.evaluation.decision import DecisionRule


@dataclass(frozen=True)
class Predictions:
    """Log-odds of the rows of one part, in the order of the data set.

    Attributes:
        loss: mean over all terms.
        labels: (n,) float64 of 0 and 1.
        logit: (n,) float64, log-odds of the event as the model gives them.
        rows: (n,) int64, positions in the data set.
        offset: (n,) float64, the share of ``logit`` that stage 1 gives; zero where it gives none.
        rule: makes probabilities of the log-odds.
    """

    loss: float
    labels: NDArray[np.float64]
    logit: NDArray[np.float64]
    rows: NDArray[np.int64]
    offset: NDArray[np.float64]
    rule: DecisionRule = field(default_factory=DecisionRule)

    @property
    def probability(self) -> NDArray[np.float64]:
        """Probability of the event, (n,)."""
        return self.rule.probability(self.logit)

    @property
    def alarms(self) -> NDArray[np.bool_]:
        """Which rows are predicted to have the event, (n,)."""
        return self.probability >= self.rule.threshold

    def auroc(self) -> float:
        """Return the area under the ROC curve; both labels must be there."""
        return float(roc_auc_score(self.labels, self.probability))

    def with_residual_weight(self, weight: float) -> Predictions:
        """Return the predictions with all of the log-odds but stage 1's share weighted."""
        return replace(self, logit=self.offset + weight * (self.logit - self.offset))

    def with_rule(self, rule: DecisionRule) -> Predictions:
        """Return the same log-odds under another rule."""
        return replace(self, rule=rule)
