"""What differs between kinds of outcome: what is learned, and what the outputs of a model are.

A label is a ``LabelOutcome``, times are their ``Hazards``. What is evaluated are the outcome's
``targets``. Letters: B patients, N members, Q outputs a patient, W outputs of a language model,
n rows, T targets, C events, K intervals. A forecast is what a model says of n rows: log-odds (n,)
of a label, cumulative hazards (n, C, K) of times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation import baselines
from medgemma_clinical.evaluation.baselines import ENSEMBLE
from medgemma_clinical.evaluation.decision import Predictions, Rules
from medgemma_clinical.evaluation.metrics import Array, log_odds, of_labels, row_losses
from medgemma_clinical.evaluation.target import LABEL, Target
from medgemma_clinical.files import InputError

if TYPE_CHECKING:  # loads torch, which commands on files of results do without
    from torch import Tensor

    from medgemma_clinical.models.hazards import Hazards


class LabelOutcome:
    """An event, yes or no."""

    targets: ClassVar[tuple[Target, ...]] = (LABEL,)
    width: ClassVar[int] = 1  # Q
    residual_width: ClassVar[int] = 1  # W
    null_outputs: ClassVar[tuple[float, ...]] = (0.0,)  # (Q,) to which text alone is added
    config: ClassVar[dict[str, Any]] = {}  # keys of a checkpoint by which the kind is known again
    about: ClassVar[list[str]] = []  # what a card says of it
    curve_end: ClassVar[float] = 0.0  # hours up to which the risk has a curve

    # ------------------------------------------------------------------ what is learned

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy (N,), a sum over B, of logits (N, B, 1) and labels (B,)."""
        from torch.nn import functional

        logits = logits.squeeze(2)
        expanded = targets.expand_as(logits)
        losses = functional.binary_cross_entropy_with_logits(logits, expanded, reduction="none")
        return losses.sum(dim=1)

    def start(self, targets: Array) -> Array:
        """Return the logit (1,) that is the same for everyone and fits labels (n,)."""
        share = float(targets.mean())
        return np.array([math.log(share / (1 - share))])

    def added(self, residual: Tensor) -> Tensor:
        """Return what a language model's logits (B, 1) add to stage 1's, (B, 1)."""
        return residual

    def row_losses(self, targets: Array, outputs: Array) -> Array:
        """Return the cross-entropy (N, n) of labels (n,) and logits (N, n, 1)."""
        return row_losses(targets, outputs[..., 0])

    def shift(self, outputs: Array, targets: Array) -> Array:
        """Return what makes logits (n, 1) fit labels (n,) on average, (1,)."""
        return of_labels(targets).fit_level(expit(outputs[:, 0]))

    def logit(self, outputs: Tensor) -> Tensor:
        """Return the log-odds (B,) of the first risk for logits (B, 1)."""
        return outputs.squeeze(1)

    def fits(self, dataset: TrajectoryDataset, rows: NDArray[np.int64]) -> baselines.LabelFits:
        """Return how baselines are fitted to some rows."""
        return baselines.label_fits(dataset, rows)

    # ------------------------------------------------------------------ forecasts

    def forecast(self, outputs: Array) -> Array:
        """Return the forecast (n,) of logits (n, 1)."""
        return outputs[:, 0]

    def moved(self, forecast: Array, share: Array) -> Array:
        """Return the forecast (n,) whose logits rise by a share (n, 1)."""
        return forecast + share[:, 0]

    def blend(self, *forecasts: Array) -> Array:
        """Return the mean of several forecasts, (n,)."""
        return log_odds(baselines.blend(*map(expit, forecasts)))

    def risks(self, forecast: Array) -> Array:
        """Return the risks (n, T) of the targets."""
        risk: Array = expit(forecast)
        return risk[:, None]

    def curves(
        self, forecast: Array, hours: Sequence[float] | None, rules: Rules
    ) -> tuple[Array, Sequence[str], Array]:
        """Refuse: a label has no time."""
        raise InputError("no cumulative incidence: the model was trained on a label, not on times")


Outcome: TypeAlias = "LabelOutcome | Hazards"
LABELS = LabelOutcome()


def weighted(predictions: Predictions, weight: float | None) -> Predictions:
    """Return the predictions of stage 1 and what text adds by this weight; None: unchanged."""
    if weight is None:
        return predictions
    share = weight * (predictions.outputs - predictions.offset)
    return replace(predictions, outputs=predictions.offset + share, share=share)


def with_text(outcome: Outcome, predictions: Predictions, numbers: Array) -> Predictions:
    """Return the predictions of stage 1 to which what texts say (n, W) is added."""
    outputs = predictions.outputs
    return replace(predictions, outputs=outputs + text_share(outcome, numbers), offset=outputs)


def text_share(outcome: Outcome, numbers: Array) -> Array:
    """Return what the numbers (n, W) of texts add to the outputs of stage 1, (n, Q)."""
    import torch  # a stage has loaded it; see above

    share: Array = outcome.added(torch.from_numpy(numbers)).numpy()
    return share


def forecasts_of_models(
    outcome: Outcome,
    stage: str,
    forecast: Array,
    beside: Mapping[str, Array],
    share: Array | None = None,
) -> dict[str, Array]:
    """Return the forecasts of stage, baselines, and the ensemble of stage and best blend.

    A share (n, Q) of text in the stage's outputs is added to the blend, too: it counts in full.
    """
    forecasts = {stage: forecast, **beside}
    if best := baselines.best_blend(beside):
        other = beside[best] if share is None else outcome.moved(beside[best], share)
        forecasts[ENSEMBLE] = outcome.blend(forecast, other)
    return forecasts


def risk_columns(outcome: Outcome, forecasts: Mapping[str, Array]) -> dict[str, Array]:
    """Return the columns of a table of predictions that hold risks, as models give them."""
    return {
        target.column(model): risk
        for model, forecast in forecasts.items()
        for target, risk in zip(outcome.targets, outcome.risks(forecast).T, strict=True)
    }


def first_auroc(outcome: Outcome, observed: pd.DataFrame, outputs: Array) -> float:
    """Return the AUROC of the first risk of outputs (n, Q), NaN where it is undefined."""
    risk = outcome.risks(outcome.forecast(outputs))[:, 0]
    value: float = outcome.targets[0].known(observed).ranking(risk)["auroc"].item()
    return value


def fit_outcome(data: Data) -> Outcome:
    """Return the outcome of a data set, its cut points chosen on the training part."""
    dataset = data.dataset
    if dataset.competing_events is None:
        return LABELS
    from medgemma_clinical.models.hazards import Hazards

    return Hazards.fitted(dataset.competing_events, dataset.targets()[data.split["train"]])


def outcome_of(config: Mapping[str, Any]) -> Outcome:
    """Return the outcome that a checkpoint's configuration describes."""
    if "events" not in config:
        return LABELS
    from medgemma_clinical.models.hazards import Hazards

    return Hazards.from_config(config)
