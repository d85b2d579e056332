"""Times to events that compete, learned as discrete-time hazards: loss, risks at each horizon.

Letters: B patients, N members, C causes (the events), K intervals, Q = C * (K + 1), n rows,
T targets, H hours. A forecast is the cumulative hazards (n, C, K) of n rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation import baselines, time_baselines
from medgemma_clinical.evaluation.decision import Rules
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.target import Target, targets_of
from medgemma_clinical.evaluation.time_metrics import CLOGLOG

MAX_INTERVALS, EVENTS_AN_INTERVAL = 8, 20
"""Intervals up to the last horizon, and training events of the first cause that each needs."""

SMALLEST = 1e-9
"""Least cumulative hazard whose logarithm is taken."""

SMALLEST_NULL = 0.01
"""Least loss of a null model: where nearly all rows end within an interval it may fall below 0."""

MAX_SHIFT = 5.0


class Watched(NamedTuple):
    """How the rows were watched in each interval."""

    exposure: Tensor  # (B, K) share of the interval in which a row was at risk
    is_event: Tensor  # (B, C, K) whether the row ended there by this cause


def inverse_softplus(hazards: Array) -> Array:
    """Return the sums whose softplus are cumulative hazards."""
    hazards = hazards.clip(SMALLEST)
    sums: Array = hazards + np.log(-np.expm1(-hazards))
    return sums


@dataclass(frozen=True)
class Hazards:
    """The outcome of times: cause-specific hazards, logistic in each of K intervals.

    Of each cause K outputs are of an interval each, and one is added to all of them: few rows with
    a high hazard reach the late intervals, which learn from the early ones by it. A sum z gives
    the chance sigmoid(z) that a cause ends an interval that nothing else ends; the cumulative
    hazard softplus(z) grows evenly within it, and the likelihood is that of such times.

    Source: Tutz and Schmid 2016, "Modeling Discrete Time-to-Event Data", chapter 8; Kvamme and
    Borgan 2021, "Continuous and discrete-time survival prediction with neural networks".
    """

    events: CompetingEvents
    cuts: tuple[float, ...]  # (K,) hours at which the intervals end; all horizons are among them
    null: tuple[float, ...]  # (C,) mean loss of a row by the same hazards for everyone, by cause
    null_outputs: tuple[float, ...] = ()  # (Q,) that give these hazards

    @classmethod
    def fitted(cls, events: CompetingEvents, targets: Array) -> Self:
        """Choose the cut points on the training part's ``TARGETS`` (n, 3)."""
        hours, event = targets[:, 1], targets[:, 2]
        times = hours[(event == 1) & (hours <= events.horizons[-1])]
        parts = min(MAX_INTERVALS, len(times) // EVENTS_AN_INTERVAL)
        inner = np.quantile(times, np.arange(1, parts) / parts) if parts > 1 else np.empty(0)
        # Rounded, so that no cut point is the time of a patient.
        rounded = [float(f"{hour:.2g}") for hour in inner]
        cuts = sorted({*rounded, *events.horizons} - {0.0})
        grid = cls(events, tuple(x for x in cuts if x <= events.horizons[-1]), ())
        start = grid.start(targets)
        everyone = torch.from_numpy(start).expand(1, len(targets), -1)
        losses = grid.losses(everyone, torch.from_numpy(targets)).sum(dim=1)
        null = (losses[0] / len(targets)).clamp(min=SMALLEST_NULL)
        # Rounded, so that they tell no count of events.
        return cls(events, grid.cuts, tuple(null.tolist()), tuple(start.round(2).tolist()))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys of a checkpoint that ``config`` gives."""
        stored = config["events"]
        lists = [tuple(stored.get(name, ())) for name in ("cuts", "null", "null_outputs")]
        return cls(CompetingEvents.from_config(stored), *lists)

    @property
    def config(self) -> dict[str, Any]:
        """Keys of a checkpoint by which the kind is known again, plain types."""
        own = {"cuts": self.cuts, "null": self.null, "null_outputs": self.null_outputs}
        plain = {**asdict(self.events), **own}
        return {"events": {k: list(x) if isinstance(x, tuple) else x for k, x in plain.items()}}

    @property
    def targets(self) -> tuple[Target, ...]:
        """What is evaluated: event 1 by each horizon, then as if there were no intervention."""
        return targets_of(self.events)

    @property
    def width(self) -> int:
        """Q."""
        return len(self.events.names) * (len(self.cuts) + 1)

    @property
    def residual_width(self) -> int:
        """The numbers of a language model, one a cause."""
        return len(self.events.names)

    @property
    def about(self) -> list[str]:
        """What a card says of it."""
        first, *others = self.events.names
        text = f"The risks are of {first} by {', '.join(self.events.horizon_names)}"
        if others:
            text += f"; competing events: {', '.join(others)}"
        return [text, self.events.assumption] if self.events.assumption else [text]

    @property
    def curve_end(self) -> float:
        """Hours up to which the risk has a curve."""
        return self.events.horizons[-1]

    # ------------------------------------------------------------------ what is learned

    def cumulative(self, outputs: Tensor) -> Tensor:
        """Return the cumulative hazard (..., C, K) of each interval for outputs (..., Q)."""
        outputs = outputs.unflatten(-1, (-1, len(self.cuts) + 1))
        return functional.softplus(outputs[..., :-1] + outputs[..., -1:])

    def watched(self, targets: Tensor) -> Watched:
        """Return how rows with ``TARGETS`` (B, 3) were watched."""
        entry, hours, event = targets[:, :, None].unbind(1)  # (B, 1) each
        ends = targets.new_tensor(self.cuts)
        begins = functional.pad(ends[:-1], (1, 0))
        entered = torch.maximum(begins, entry)
        exposure = (torch.minimum(ends, hours) - entered) / (ends - begins)
        ended = (hours <= ends) & ((hours > begins) | (begins == 0))
        causes = torch.arange(1, len(self.events.names) + 1, device=targets.device)
        is_event = ended[:, None] & (event == causes)[:, :, None]
        return Watched(exposure.clamp(min=0), is_event)

    def added(self, numbers: Tensor) -> Tensor:
        """Return the outputs (..., Q) that add a number (..., C) of each cause to all intervals.

        A language model adds them to those of stage 1.
        """
        return functional.pad(numbers[..., None], (len(self.cuts), 0)).flatten(-2)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-likelihood (N, B, C) of outputs (N, B, Q)."""
        watched = self.watched(targets)
        hazard = self.cumulative(outputs)  # (N, B, C, K)
        log_hazard = hazard.clamp(min=SMALLEST).log()
        losses = watched.exposure[:, None] * hazard - watched.is_event * log_hazard
        return losses.sum(dim=3)

    def relative_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss (N, B) of outputs (N, B, Q), each cause relative to its null model."""
        losses = self.losses(outputs, targets)
        return (losses / losses.new_tensor(self.null)).sum(dim=2)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss (N,), a sum over B, of outputs (N, B, Q) and ``TARGETS`` (B, 3)."""
        return self.relative_losses(outputs, targets).sum(dim=1)

    def row_losses(self, targets: Array, outputs: Array) -> Array:
        """Return the loss (N, n) of ``TARGETS`` (n, 3) and outputs (N, n, Q)."""
        losses = self.relative_losses(torch.from_numpy(outputs), torch.from_numpy(targets))
        rows: Array = losses.numpy()
        return rows

    def start(self, targets: Array) -> Array:
        """Return the outputs (Q,) that are the same for everyone and fit ``TARGETS`` (n, 3)."""
        watched = self.watched(torch.from_numpy(targets))
        events, exposure = watched.is_event.sum(dim=0), watched.exposure.sum(dim=0)  # (C, K), (K,)
        logits = torch.expm1((events + 0.5) / (exposure + 0.5)).log()
        outputs: Array = functional.pad(logits, (0, 1)).flatten().numpy()
        return outputs

    def shift(self, outputs: Array, targets: Array) -> Array:
        """Return what makes the outputs (n, Q) of each cause fit ``TARGETS`` on average, (Q,)."""
        exposure, is_event = (x.numpy() for x in self.watched(torch.from_numpy(targets)))
        z = inverse_softplus(self.forecast(outputs))

        def excess(shift: float, cause: int) -> float:
            """Return the expected minus the observed events of a cause."""
            expected = exposure * np.logaddexp(0, z[:, cause] + shift)
            return float(expected.sum() - is_event[:, cause].sum())

        def root(cause: int) -> float:
            """Return the shift without excess, a bound where none has none."""
            if excess(-MAX_SHIFT, cause) >= 0:
                return -MAX_SHIFT
            return float(brentq(excess, -MAX_SHIFT, MAX_SHIFT, (cause,)))

        shifts = [root(cause) for cause in range(len(self.events.names))]
        return np.kron(shifts, np.eye(1, len(self.cuts) + 1, len(self.cuts))[0])

    def incidence(
        self, hazard: Tensor, hours: Sequence[float], without: tuple[int, ...] = ()
    ) -> Tensor:
        """Return the cumulative incidence (..., C, H) by some hours for hazards (..., C, K).

        ``without`` names events that are taken not to happen.
        """
        happens = [float(event not in without) for event in range(1, hazard.shape[-2] + 1)]
        ends, until = hazard.new_tensor(self.cuts), hazard.new_tensor(list(hours))
        begins = functional.pad(ends[:-1], (1, 0))
        passed = ((until[:, None] - begins) / (ends - begins)).clamp(0, 1)  # (H, K)
        hazard = (hazard * hazard.new_tensor(happens)[:, None]).unsqueeze(-2) * passed
        total = hazard.sum(dim=-3, keepdim=True).clamp(min=SMALLEST)  # (..., 1, H, K)
        before = torch.exp(total - total.cumsum(dim=-1))  # free of events at the begin of each
        return (before * hazard * -torch.expm1(-total) / total).sum(dim=-1)

    def target_risks(self, hazard: Tensor) -> Tensor:
        """Return the risks (..., T) of the targets for hazards (..., C, K)."""
        horizons, interventions = self.events.horizons, self.events.interventions
        risks = [self.incidence(hazard, horizons)[..., 0, :]]
        if interventions:
            risks.append(self.incidence(hazard, horizons, interventions)[..., 0, :])
        return torch.cat(risks, dim=-1)

    def logit(self, outputs: Tensor) -> Tensor:
        """Return the log-odds (B,) float64 of the first risk for outputs (B, Q)."""
        return self.target_risks(self.cumulative(outputs.double()))[:, 0].logit(eps=1e-12)

    def fits(
        self, dataset: TrajectoryDataset, rows: NDArray[np.int64]
    ) -> time_baselines.PeriodFits:
        """Return how baselines are fitted to some rows."""
        targets = dataset.targets()[rows]
        watched = self.watched(torch.from_numpy(targets))
        periods = time_baselines.periods_of(watched.exposure.numpy(), watched.is_event.numpy())
        _, hours, event = targets.T
        null = time_baselines.null_hazards(hours, event, self.cuts)
        return time_baselines.PeriodFits(periods, null)

    # ------------------------------------------------------------------ forecasts

    def forecast(self, outputs: Array) -> Array:
        """Return the forecast (n, C, K) of outputs (n, Q)."""
        forecast: Array = self.cumulative(torch.from_numpy(outputs)).numpy()
        return forecast

    def moved(self, forecast: Array, share: Array) -> Array:
        """Return the forecast (n, C, K) whose outputs rise by a share (n, Q)."""
        of_cause = share.reshape(len(share), -1, len(self.cuts) + 1)
        z = inverse_softplus(forecast) + of_cause[..., :-1] + of_cause[..., -1:]
        hazards: Array = np.logaddexp(0, z)
        return hazards

    def blend(self, *forecasts: Array) -> Array:
        """Return the mean of several forecasts, (n, C, K)."""
        return baselines.blend_hazards(*forecasts)

    def risks(self, forecast: Array) -> Array:
        """Return the risks (n, T) of the targets."""
        risks: Array = self.target_risks(torch.from_numpy(forecast)).numpy()
        return risks

    def curves(
        self, forecast: Array, hours: Sequence[float] | None, rules: Rules
    ) -> tuple[Array, Sequence[str], Array]:
        """Return some hours (H,), the C events, and their cumulative incidence (n, C, H).

        None: the ends of the intervals. Between horizons a rule of the first event is interpolated.
        """
        events, last = self.events, self.cuts[-1]
        until = np.array(self.cuts if hours is None else hours, dtype=np.float64)
        if until.ndim != 1 or not ((until >= 0) & (until <= last)).all():
            raise ValueError(f"hours: numbers from 0 to the last horizon, {last:g}")
        incidence = self.incidence(torch.from_numpy(forecast), until.tolist()).numpy()
        of_horizons = [rules[name] for name in events.horizon_risks]
        if any(rule.is_moved for rule in of_horizons):
            multiplier = np.interp(until, events.horizons, [x.multiplier for x in of_horizons])
            shift = np.interp(until, events.horizons, [x.shift for x in of_horizons])
            order = np.argsort(until)
            first = CLOGLOG.moved(incidence[:, 0], multiplier, shift)[:, order]
            first = np.maximum.accumulate(first, axis=1)[:, np.argsort(order)]
            # The others share what it leaves.
            incidence[:, 1:] *= ((1 - first) / (1 - incidence[:, 0]).clip(1e-12))[:, None]
            incidence[:, 0] = first
        return until, events.names, incidence
