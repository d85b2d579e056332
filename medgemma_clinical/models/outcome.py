"""What differs between kinds of outcome: one object a kind; nothing else asks which it is.

Letters: B patients, N members, Q logits a patient, W logits of a language model, n rows, C events,
K intervals. A forecast is what a model says of n rows: probabilities (n,) of a label, cumulative
hazards (n, C, K) of times.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation import baselines, decision, tables, verdicts
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, Baselines, Settings
from medgemma_clinical.evaluation.decision import DecisionOptions, DecisionRule, Predictions
from medgemma_clinical.evaluation.metrics import Array, log_odds, row_losses
from medgemma_clinical.evaluation.metrics_table import (
    TESTED,
    Drawn,
    Metrics,
    draw_metrics,
    evaluate,
)
from medgemma_clinical.evaluation.reference import reference
from medgemma_clinical.evaluation.time_baselines import (
    Periods,
    TimeBaselines,
    blend_hazards,
    fit_time_baselines,
    periods_of,
    time_baseline_names,
    tune_time_baselines,
)
from medgemma_clinical.evaluation.time_metrics import statuses_at
from medgemma_clinical.evaluation.time_table import (
    OBSERVED,
    TIME_METRICS,
    draw_time_metrics,
    evaluate_times,
    horizon_problem,
    metric_name,
    statuses_of,
    time_sentences,
    time_table,
    uncensored_columns,
)
from medgemma_clinical.evaluation.time_updates import (
    TimeUpdates,
    evaluate_time_updates,
    moved_risk,
)
from medgemma_clinical.evaluation.topics.calibration import calibration_topic, calibration_updates
from medgemma_clinical.evaluation.topics.decision_curve import decision as decision_topic
from medgemma_clinical.evaluation.topics.discrimination import discrimination, model_comparison
from medgemma_clinical.evaluation.topics.subgroups import sites, subgroups
from medgemma_clinical.evaluation.topics.times import time_topics, time_updates
from medgemma_clinical.evaluation.topics.topic import TopicBuilder
from medgemma_clinical.evaluation.updating import evaluate_updates, updated_rule
from medgemma_clinical.files import InputError

if TYPE_CHECKING:  # loads torch, which commands on files of results do without
    from torch import Tensor

    from medgemma_clinical.models.hazards import Hazards

logger = logging.getLogger(__name__)

Config = Any
"""A checkpoint's configuration, ``checkpoints.Config``."""

Moves = Mapping[str, Sequence[float]]
NO_MOVES: Moves = {}
"""Slope and intercept by which an update moves each risk of times, on the scale of hazards."""


def prior_log_odds(prevalence: float) -> float:
    """Return the log-odds of a share of events within (0, 1)."""
    return math.log(prevalence / (1 - prevalence))


class LabelOutcome:
    """An event, yes or no."""

    width: ClassVar[int] = 1  # Q
    residual_width: ClassVar[int] = 1  # W
    null_outputs: ClassVar[tuple[float, ...]] = (0.0,)  # (Q,) to which text alone is added
    config: ClassVar[dict[str, Any]] = {}  # keys of a checkpoint by which the kind is known again
    has_tripod: ClassVar[bool] = True
    has_curves: ClassVar[bool] = False  # of the risk over the hours to come
    about: ClassVar[list[str]] = []  # what a card says of it
    card_metrics: ClassVar[dict[str, str]] = {  # title: name
        "AUROC": "auroc",
        "AUPRC": "auprc",
        "Brier score": "brier",
    }
    tested: ClassVar[list[str]] = TESTED  # columns of a table of predictions that are no risks
    means_of_folds: ClassVar[str] = "AUROC, AUPRC, Brier score, scaled Brier score and log loss"

    baseline_names = staticmethod(baselines.baseline_names)
    tune_baselines = staticmethod(baselines.tune_baselines)
    fit_baselines = staticmethod(baselines.fit_baselines)
    read_baselines = Baselines.from_json
    decide_folds = staticmethod(baselines.decide_folds)
    evaluate = staticmethod(evaluate)
    draw_metrics = staticmethod(draw_metrics)
    evaluate_updates = staticmethod(evaluate_updates)
    sentences = staticmethod(verdicts.sentences)
    table = staticmethod(tables.model_table)
    update_topic = staticmethod(calibration_updates)

    def topics(self, before: Array | None = None, recalibration: str = "") -> list[TopicBuilder]:
        """Return what builds the sections of a report on the risks, in their order.

        ``before`` (n,): risks before the recalibration, which ``recalibration`` describes.
        """
        calibration = partial(calibration_topic, before=before, recalibration=recalibration)
        return [discrimination, calibration, decision_topic, model_comparison, subgroups, sites]

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
        return np.array([prior_log_odds(float(targets.mean()))])

    def added(self, residual: Tensor) -> Tensor:
        """Return what a language model's logits (B, 1) add to stage 1's, (B, 1)."""
        return residual

    def row_losses(self, targets: Array, outputs: Array) -> Array:
        """Return the cross-entropy (N, n) of labels (n,) and logits (N, n, 1)."""
        return row_losses(targets, outputs[..., 0])

    def auroc(self, targets: Array, outputs: Array) -> float:
        """Return the area under the ROC curve of labels (n,) and logits (n, 1)."""
        return float(roc_auc_score(targets, outputs[:, 0]))

    def shift(self, predictions: Predictions, targets: Array) -> Array:
        """Return what makes the logits fit labels (n,) on average, (1,)."""
        fits = decision.fit_updates(targets, predictions.probability)
        return np.array([fits[decision.INTERCEPT][1]])

    def read(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the log-odds (B,) of the event for logits (B, 1), and no hazards."""
        return logits.squeeze(1), None

    # ------------------------------------------------------------------ forecasts

    def forecast(self, predictions: Predictions) -> Array:
        """Return the forecast of the predicted rows, (n,)."""
        return predictions.probability

    def forecast_of(self, logit: Array, hazards: Array | None, rule: DecisionRule) -> Array:
        """Return the forecast of log-odds (n,), recalibrated by a rule, (n,)."""
        return rule.probability(logit)

    def models(
        self,
        stage: str,
        forecast: Array,
        beside: Mapping[str, Array],
        rules: Mapping[str, DecisionRule],
        update: tuple[float, float] = (1.0, 0.0),  # slope and intercept that moved the stage
    ) -> dict[str, Array]:
        """Return the forecast of stage, baselines and ensemble, of which no update moves the last.

        ``rules`` recalibrate all but the stage.
        """
        slope, intercept = update
        before = forecast
        if update != (1.0, 0.0):
            before = expit((log_odds(forecast) - intercept) / slope)
        return baselines.model_risks(stage, before, beside, rules) | {stage: forecast}

    def risks(self, name: str, forecast: Array, moves: Moves = NO_MOVES) -> dict[str, Array]:
        """Return the columns of a table of predictions that hold the risks of a model."""
        return {name: forecast}

    def columns(self, name: str, ending: str) -> dict[str, str]:
        """Return the columns of ``predict`` by those of ``risks``; the used model's end in ""."""
        return {name: f"probability{ending}"}

    def curves(
        self, forecast: Array, hours: Sequence[float] | None, moves: Moves
    ) -> tuple[Array, Sequence[str], Array]:
        """Refuse: a label has no time."""
        raise InputError("no cumulative incidence: the model was trained on a label, not on times")

    # ------------------------------------------------------------------ decisions

    def decide(
        self, predictions: Predictions, observed: pd.DataFrame, options: DecisionOptions
    ) -> DecisionRule:
        """Fit recalibration and threshold to rows that the model did not learn from."""
        patients = observed["patient"].to_numpy(str)
        return decision.fit_decision_rule(predictions.labels, predictions.logit, patients, options)

    def fit_rules(
        self,
        stage: str,
        forecast: Array,
        beside: Mapping[str, Array],
        observed: pd.DataFrame,
        options: DecisionOptions,
    ) -> dict[str, DecisionRule]:
        """Fit the decision rule of each model beside the stage to the same rows."""
        labels, patients = observed["label"].to_numpy(float), observed["patient"].to_numpy(str)
        return baselines.fit_rules(labels, stage, forecast, beside, patients, options)

    def choose_threshold(self, choice: str, table: pd.DataFrame | None, name: str) -> float:
        """Return a model's threshold of a ``--threshold``, chosen on held-out predictions."""
        labels, risk = np.zeros(1), np.zeros(1)
        if table is not None:
            labels, risk = table["label"].to_numpy(float), table[name].to_numpy(float)
        return decision.choose_threshold(choice, labels, risk)

    def recommend(
        self, table: pd.DataFrame, metrics: Metrics, stage: str, names: Sequence[str]
    ) -> dict[str, str | None]:
        """Return ``best_model``, that of ``--use best``, by held-out rows and their metrics."""
        names = [name for name in table.columns if name in (stage, *names)]
        labels, patients = table["label"].to_numpy(float), table["patient"].to_numpy(str)
        losses = row_losses(labels, log_odds(table[names].to_numpy(float).T))
        preferred, events = [ENSEMBLE, stage], metrics.counts["events"]
        planned = verdicts.planned_above_chance(metrics)
        best = decision.recommended_model(names, losses, events, patients, preferred, planned)
        return {"best_model": best}

    def references(self, table: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
        """Return ``reference``, how models are calibrated in a table of held-out predictions."""
        labels, patients = table["label"].to_numpy(float), table["patient"].to_numpy(str)
        found = {name: reference(labels, table[name].to_numpy(float), patients) for name in names}
        return {"reference": {name: entry for name, entry in found.items() if entry is not None}}

    # ------------------------------------------------------------------ results

    def observed(
        self, dataset: TrajectoryDataset, rows: NDArray[np.int64], censoring: str, seed: int
    ) -> pd.DataFrame:
        """Return the columns of a table of predictions that are no risks."""
        labels = dataset.labels[rows].astype(int)
        columns = {"id": dataset.ids[rows], "label": labels, "patient": dataset.groups[rows]}
        return pd.DataFrame(columns)

    def evaluation_problem(self, observed: pd.DataFrame) -> str:
        """Return why some rows have no metrics, empty where they have."""
        if observed["label"].nunique() == 2:
            return ""
        left = "of those that are left all have, or all lack, the event"
        return left if len(observed) else "none left"

    def updated(
        self, config: Config, used: str, rule: DecisionRule, updates: Any, rows: pd.DataFrame
    ) -> Config:
        """Return a configuration in which the rule of a model is updated on labelled rows."""
        moved = asdict(updated_rule(rule, updates.slope, updates.intercept))
        stage, earlier = STAGE_NAMES[config["stage"]], config.get("updated", {})
        total = earlier.get("stage", [1.0, 0.0])  # so that the ensemble of the stage stays
        odds = log_odds(rows[used].to_numpy(float))
        risk = DecisionRule(updates.slope, updates.intercept).probability(odds)
        kept = {name: x for name, x in config.get("reference", {}).items() if name != used}
        kept |= self.references(rows.assign(**{used: risk}), [used])["reference"]
        config = {**config, "reference": kept}
        if used != stage:
            config = {**config, "models": {**config["models"], used: moved}}
        else:
            config = {**config, "decision": moved}
            slope, intercept = updates.slope, updates.intercept
            total = [slope * total[0], intercept + slope * total[1]]
        return {**config, "updated": {"stage": total}}


@dataclass(frozen=True)
class TimeOutcome:
    """Times to events that compete."""

    hazards: Hazards
    has_tripod: ClassVar[bool] = False
    has_curves: ClassVar[bool] = True
    tested: ClassVar[list[str]] = OBSERVED
    means_of_folds: ClassVar[str] = "AUROC, Brier score and scaled Brier score"
    update_topic = staticmethod(time_updates)

    def topics(self, before: None = None, recalibration: str = "") -> list[TopicBuilder]:
        """Return what builds the sections of a report on the risks, which no rule moves."""
        return time_topics(self.hazards.events)

    @property
    def width(self) -> int:
        """Q."""
        return self.hazards.width

    @property
    def residual_width(self) -> int:
        """W, a number a cause."""
        return len(self.hazards.events.names)

    @property
    def null_outputs(self) -> tuple[float, ...]:
        """The outputs (Q,) to which those of text alone are added."""
        return self.hazards.null_outputs

    @property
    def config(self) -> dict[str, Any]:
        """Keys of a checkpoint by which the kind is known again."""
        return {"events": self.hazards.config}

    @property
    def about(self) -> list[str]:
        """What a card says of it."""
        events = self.hazards.events
        others = ", ".join(events.names[1:])
        text = f"The risks are of {events.names[0]} by {', '.join(events.horizon_names)}"
        return [
            text + (f", while others compete with it: {others}" if others else ""),
            *filter(None, [events.assumption]),
        ]

    @property
    def card_metrics(self) -> dict[str, str]:
        """Titles and names of the metrics that a card lists."""
        events = self.hazards.events
        return {
            f"{TIME_METRICS[metric][0]} {risk.removeprefix('risk_')}": metric_name(
                metric, risk, events
            )
            for risk in events.risk_names
            for metric in ("auroc", "oe")
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the risks."""
        return self.hazards.events.risk_names

    # ------------------------------------------------------------------ what is learned

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss (N,), a sum over B, of outputs (N, B, Q) and ``TARGETS`` (B, 3)."""
        return self.hazards.loss(logits, targets).sum(dim=1)

    def start(self, targets: Array) -> Array:
        """Return the logits (Q,) that are the same for everyone and fit ``TARGETS`` (n, 3)."""
        return self.hazards.start(targets)

    def added(self, residual: Tensor) -> Tensor:
        """Return the outputs (B, Q) that a language model's numbers (B, W) add to stage 1's."""
        return self.hazards.added(residual)

    def row_losses(self, targets: Array, outputs: Array) -> Array:
        """Return the loss (N, n) of ``TARGETS`` (n, 3) and outputs (N, n, Q)."""
        losses: Array = self.hazards.loss(*map(self.hazards.tensor, (outputs, targets))).numpy()
        return losses

    def auroc(self, targets: Array, outputs: Array) -> float:
        """Return the AUROC of the first risk for ``TARGETS`` (n, 3) and outputs (n, Q)."""
        _, hours, event = targets.T
        hazards = self.hazards.cumulative(self.hazards.tensor(outputs))
        once = np.ones((1, len(outputs)))
        statuses = statuses_at(hours, event, self.hazards.events.horizons[0], once)
        return float(statuses.ranking(self.first_risk(hazards.numpy()))["auroc"][0])

    def shift(self, predictions: Predictions, targets: Array) -> Array:
        """Return what makes the hazards fit ``TARGETS`` (n, 3) on average, (Q,)."""
        assert predictions.hazards is not None
        return self.hazards.shift(predictions.hazards, targets)

    def read(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the log-odds (B,) float64 of the first risk for logits (B, Q), and these."""
        hazards = self.hazards.cumulative(logits.double())
        return self.hazards.risks(hazards)[:, 0].logit(eps=1e-12), logits

    # ------------------------------------------------------------------ baselines

    def periods(self, dataset: TrajectoryDataset, rows: NDArray[np.int64]) -> Periods:
        """Return some rows in the intervals in which they were watched."""
        watched = self.hazards.watched(self.hazards.tensor(dataset.targets()[rows]))
        return periods_of(watched.exposure.numpy(), watched.is_event.numpy())

    def baseline_names(
        self, dataset: TrajectoryDataset, train: NDArray[np.int64], static: Sequence[str]
    ) -> list[str]:
        """Return the names of the baselines that ``fit_baselines`` fits, in no order."""
        return time_baseline_names(dataset, static)

    def tune_baselines(
        self, dataset: TrajectoryDataset, train: NDArray[np.int64], static: Sequence[str]
    ) -> Settings:
        """Choose the settings of the baselines in folds of some rows, where these are enough."""
        return tune_time_baselines(dataset, train, static, self.periods(dataset, train))

    def fit_baselines(
        self, dataset: TrajectoryDataset, rows: NDArray[np.int64], settings: Settings
    ) -> Baselines:
        """Fit the baselines on some rows."""
        periods = self.periods(dataset, rows)
        return fit_time_baselines(dataset, rows, settings, periods, self.hazards.cuts)

    def read_baselines(self, text: str) -> Baselines:
        """Check and return the baselines of a file."""
        read = TimeBaselines.from_json(text)
        if read.null.shape != (len(self.hazards.events.names), len(self.hazards.cuts)):
            raise ValueError("other events or intervals")
        return read

    # ------------------------------------------------------------------ forecasts

    def forecast(self, predictions: Predictions) -> Array:
        """Return the forecast of the predicted rows, (n, C, K)."""
        return self.forecast_of(predictions.logit, predictions.hazards, predictions.rule)

    def forecast_of(self, logit: Array, hazards: Array | None, rule: DecisionRule) -> Array:
        """Return the forecast of outputs (n, Q), (n, C, K)."""
        assert hazards is not None
        found: Array = self.hazards.cumulative(self.hazards.tensor(hazards)).numpy()
        return found

    def models(
        self,
        stage: str,
        forecast: Array,
        beside: Mapping[str, Array],
        rules: Mapping[str, DecisionRule],
        update: tuple[float, float] = (1.0, 0.0),
    ) -> dict[str, Array]:
        """Return the forecast of stage, baselines and ensemble."""
        found = {stage: forecast, **beside}
        if best := baselines.best_blend(beside):
            found[ENSEMBLE] = blend_hazards(forecast, beside[best])
        return found

    def first_risk(self, forecast: Array, moves: Moves = NO_MOVES) -> Array:
        """Return the risk (n,) of the first event by the first horizon, which thresholds cut."""
        return self.risks("", forecast, moves)[""]

    def risks(self, name: str, forecast: Array, moves: Moves = NO_MOVES) -> dict[str, Array]:
        """Return the columns of a table of predictions that hold the risks of a model."""
        risks = self.hazards.risks(self.hazards.tensor(forecast)).numpy().T
        found = {
            k: moved_risk(x, *moves.get(k, ())) for k, x in zip(self.names, risks, strict=True)
        }
        n = len(self.hazards.events.horizons)
        for earlier, later in itertools.pairwise(self.names if moves else ()):
            if later != self.names[n % len(self.names)]:  # a risk does not fall with time
                found[later] = np.maximum(found[earlier], found[later])
        return {name: found[self.names[0]], **{f"{name} {k}": x for k, x in found.items()}}

    def columns(self, name: str, ending: str) -> dict[str, str]:
        """Return the columns of ``predict`` by those of ``risks``; the used model's end in ""."""
        first = f"{self.names[0]}{ending}" if ending else "probability"
        return {name: first, **{f"{name} {risk}": f"{risk}{ending}" for risk in self.names}}

    def curves(
        self, forecast: Array, hours: Sequence[float] | None, moves: Moves
    ) -> tuple[Array, Sequence[str], Array]:
        """Return some hours (H,), the C events, and their cumulative incidence (n, C, H).

        None: the ends of the intervals. Between horizons a move of the first event is interpolated.
        """
        events, last = self.hazards.events, self.hazards.cuts[-1]
        until = np.array(self.hazards.cuts if hours is None else hours, dtype=np.float64)
        if until.ndim != 1 or not ((until >= 0) & (until <= last)).all():
            raise ValueError(f"hours: numbers from 0 to the last horizon, {last:g}")
        found = self.hazards.incidence(self.hazards.tensor(forecast), until.tolist()).numpy()
        if moves:
            pairs = np.array([moves[name] for name in events.horizon_risks]).T  # (2, H)
            slope, intercept = (np.interp(until, events.horizons, x) for x in pairs)
            order = np.argsort(until)
            first = moved_risk(found[:, 0], slope, intercept)[:, order]
            first = np.maximum.accumulate(first, axis=1)[:, np.argsort(order)]
            # The others share what it leaves.
            found[:, 1:] *= ((1 - first) / (1 - found[:, 0]).clip(1e-12))[:, None]
            found[:, 0] = first
        return until, events.names, found

    # ------------------------------------------------------------------ decisions

    def decide(
        self, predictions: Predictions, observed: pd.DataFrame, options: DecisionOptions
    ) -> DecisionRule:
        """Choose the threshold of the first risk; the risks stay as they are."""
        return self._rule(self.first_risk(self.forecast(predictions)), observed, options.threshold)

    def _rule(self, risk: Array, observed: pd.DataFrame, choice: str | None) -> DecisionRule:
        statuses = statuses_of(observed, self.hazards.events, self.names[0])
        known = statuses.inverse[0] > 0
        if choice and not decision.parse_threshold(choice)[0]:  # the risk itself
            return DecisionRule(threshold=decision.parse_threshold(choice)[1])
        if len({*statuses.case[known]}) < 2:
            text = "nothing to choose a threshold by before the first horizon: %g is taken"
            logger.warning(text, DecisionRule().threshold)
            return DecisionRule()
        weighed = statuses.case[known], risk[known], statuses.inverse[0, known]
        return DecisionRule(threshold=decision.choose_threshold(choice, *weighed))

    def fit_rules(
        self,
        stage: str,
        forecast: Array,
        beside: Mapping[str, Array],
        observed: pd.DataFrame,
        options: DecisionOptions,
    ) -> dict[str, DecisionRule]:
        """Choose the threshold of each model beside the stage on the same rows."""
        found = self.models(stage, forecast, beside, {})
        del found[stage]
        return {
            name: self._rule(self.first_risk(x), observed, options.threshold)
            for name, x in (found.items() if beside else ())
        }

    def decide_folds(
        self,
        table: pd.DataFrame,
        rules: Sequence[Mapping[str, Any]],
        fold: NDArray[np.int64],
        options: DecisionOptions,
    ) -> tuple[dict[str, DecisionRule], pd.DataFrame, None]:
        """Choose the thresholds on out-of-fold predictions, which stay as they are."""
        found = {
            name: self._rule(table[name].to_numpy(float), table, options.threshold)
            for name in rules[0]
            if name in table
        }
        return found, table, None

    def choose_threshold(self, choice: str, table: pd.DataFrame | None, name: str) -> float:
        """Return a model's threshold of a ``--threshold``, chosen on held-out predictions."""
        if table is None:
            return decision.parse_threshold(choice)[1]
        return self._rule(table[name].to_numpy(float), table, choice).threshold

    def recommend(
        self, table: pd.DataFrame, metrics: Metrics, stage: str, names: Sequence[str]
    ) -> dict[str, str | None]:
        """Return ``best_model``, that of ``--use best``, by held-out rows and their metrics."""
        names = [name for name in table.columns if name in (stage, *names)]
        losses = np.zeros((len(names), len(table)))
        for risk in self.hazards.events.horizon_risks:
            statuses = statuses_of(table, self.hazards.events, risk)
            risks = table[[f"{name} {risk}" for name in names]].to_numpy(float).T
            losses += statuses.inverse[0] * row_losses(statuses.case, log_odds(risks))
        patients, preferred = table["patient"].to_numpy(str), [ENSEMBLE, stage]
        events = metrics.counts["events"]  # by the first horizon
        planned = verdicts.planned_above_chance(metrics)
        best = decision.recommended_model(names, losses, events, patients, preferred, planned)
        return {"best_model": best}

    def references(self, table: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
        """Return nothing: times are not monitored."""
        return {}

    # ------------------------------------------------------------------ results

    def observed(
        self, dataset: TrajectoryDataset, rows: NDArray[np.int64], censoring: str, seed: int
    ) -> pd.DataFrame:
        """Return the columns of a table of predictions that are no risks."""
        assert dataset.events is not None
        assert dataset.event_hours is not None
        columns = {"id": dataset.ids[rows], "event_hours": dataset.event_hours[rows]}
        columns |= {"event": dataset.events[rows]}
        options = dataset.subset(rows), censoring, seed
        columns |= uncensored_columns(self.hazards.events, *options)
        return pd.DataFrame({**columns, "patient": dataset.groups[rows]})

    def evaluation_problem(self, observed: pd.DataFrame) -> str:
        """Return why some rows have no metrics, empty where they have."""
        return horizon_problem(observed, self.hazards.events.horizons[0])

    def evaluate_updates(self, rows: pd.DataFrame, model: str, seed: int) -> TimeUpdates | None:
        """Choose an update of each risk on known outcomes; None where there are too few."""
        return evaluate_time_updates(rows, model, self.hazards.events, seed)

    def updated(
        self, config: Config, used: str, rule: DecisionRule, updates: Any, rows: pd.DataFrame
    ) -> Config:
        """Return a configuration in which the risks of a model are moved, and its threshold."""
        stage, earlier = STAGE_NAMES[config["stage"]], config.get("moves", {})
        moves = {}
        for name, (slope, intercept) in updates.moves.items():
            before = earlier.get(used, {}).get(name, (1.0, 0.0))
            moves[name] = [slope * before[0], intercept + slope * before[1]]
        threshold = moved_risk(np.array([rule.threshold]), *updates.moves[self.names[0]])
        moved = asdict(replace(rule, threshold=float(threshold[0])))
        config = {**config, "updated": {}, "moves": {**earlier, used: moves}}
        if used != stage:
            return {**config, "models": {**config["models"], used: moved}}
        return {**config, "decision": moved}

    def evaluate(self, table: pd.DataFrame, seed: int, *rule: Any, **plan: Any) -> Metrics:
        """Return the metrics of a table of predictions at each horizon."""
        return evaluate_times(table, self.hazards.events, seed, *rule, **plan)

    def draw_metrics(
        self,
        table: pd.DataFrame,
        seed: int,
        threshold: float,
        split: NDArray[np.int64],
        recalibrated: Any,  # no rule moves times
    ) -> Drawn:
        """Return the metrics of out-of-fold predictions, before intervals are made."""
        return draw_time_metrics(table, self.hazards.events, seed, threshold, split)

    def sentences(self, metrics: Metrics, *words: str) -> list[verdicts.Finding]:
        """Return metrics in words."""
        return time_sentences(metrics, self.hazards.events, *words[1:2])

    def table(self, metrics: Metrics) -> pd.DataFrame:
        """Return metrics as a table of text."""
        return time_table(metrics, self.hazards.events)


Outcome = LabelOutcome | TimeOutcome
LABEL = LabelOutcome()


def weighted(outcome: Outcome, predictions: Predictions, weight: float | None) -> Predictions:
    """Return the predictions of stage 1 and a language model of this weight; None: unchanged."""
    if weight is None:
        return predictions
    import torch

    outputs = predictions.offset + weight * (predictions.outputs - predictions.offset)
    logit, hazards = outcome.read(torch.from_numpy(outputs))
    return replace(
        predictions, logit=logit.numpy(), hazards=None if hazards is None else hazards.numpy()
    )


def fit_outcome(data: Data) -> Outcome:
    """Return the outcome of a data set, its cut points chosen on the training part."""
    dataset = data.dataset
    if dataset.competing_events is None:
        return LABEL
    from medgemma_clinical.models.hazards import Hazards

    return TimeOutcome(
        Hazards.fitted(dataset.competing_events, dataset.targets()[data.split["train"]])
    )


def outcome_of(config: Mapping[str, Any]) -> Outcome:
    """Return the outcome that a checkpoint's configuration describes."""
    if "events" not in config:
        return LABEL
    from medgemma_clinical.models.hazards import Hazards

    return TimeOutcome(Hazards.from_config(config["events"]))
