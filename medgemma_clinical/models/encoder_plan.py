"""Plan a padded batch of irregular series: everything that an encoder needs beside its weights.

A batch advances in solver steps. The gap in front of an observation takes as many steps as the
patient's own gap needs, and the last of them ends at the observation. In each step all patients
that have a step left advance by their own step length, and those that reach an observation are
updated. No patient waits for another's longer gap, and no patient's steps depend on the batch.

Letters: B patients, L observations of the longest series, P observations of all patients together,
F features, N steps of all patients together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FEATURE_INPUTS, TIME_INPUTS = 3, 3
"""Columns of ``Plan.time_features``: for each feature, and for the observation as a whole."""


@dataclass(frozen=True)
class SolverConfig:
    """What an encoder reads, and how it cuts time into solver steps.

    Attributes:
        n_features: F.
        solver: name of the solver.
        time_scale: hours that are one unit of the equation's time.
        longest_step: in units of ``time_scale``; infinite where one call covers a whole gap.
        longest_gap: in units of ``time_scale``; a longer gap is refused.
        dtype: of the planned numbers, that of the encoder's weights.
    """

    n_features: int
    solver: str
    time_scale: float
    longest_step: float
    longest_gap: float
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked batch as a schedule of solver steps.

    The patients are sorted by their number of steps, so that those active in a step are the first
    rows of the state. Observations stand in the order of the steps that end at them, and within a
    step by row. Step 0 ends at every patient's first observation; no time passes in it. The last
    steps of a patient may lead behind the last observation, to the end of the series.

    Attributes:
        shape: (B, L) of the batch.
        config: of the encoder that made the plan.
        n_active: how many patients take part in step 0, 1, 2, ...
        n_observed: how many of them reach an observation at its end.
        dt: (N,) length of each patient's step, step after step, in units of ``time_scale``.
        rows: (P,) int64, the row of the state that each observation updates.
        observation_index: (P,) int64, the place of each observation in the flattened (B * L).
        last_value: (P, F) each feature's latest value in raw units; NaN before its first.
        time_features: (P, 3F + 3): for each feature whether it is measured now, whether it was
            measured before, and the scaled log hours since then (zero where never); then scaled
            log gap, scaled log hours since the first observation, log count.
        ends: (B,) int64, the row of the state of each patient, which stays behind the patient's
            last step; None where no end of the series was given.
    """

    shape: tuple[int, int]
    config: SolverConfig
    n_active: list[int]
    n_observed: list[int]
    dt: Tensor
    rows: Tensor
    observation_index: Tensor
    last_value: Tensor
    time_features: Tensor
    ends: Tensor | None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Plan:
        """Return the plan with its tensors on a device, as ``Tensor.to`` does."""
        members = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: member.to(device, non_blocking=non_blocking)
            for name, member in members.items()
            if isinstance(member, Tensor)
        }
        return replace(self, **moved)


def build_plan(
    times: Tensor, values: Tensor, observed: Tensor, config: SolverConfig, until: Tensor | None
) -> Plan:
    """Check a batch and plan its steps, on the host except for the gathered values.

    Args:
        times: (B, L) hours, not decreasing over a patient's observations.
        values: (B, L, F) raw units; the entries at unobserved places do not matter.
        observed: (B, L, F) bool; rows that are all False are padding behind the series.
        config: of the encoder.
        until: (B,) hours at which each series ends, None at its last observation.

    Raises:
        ValueError: wrong shapes or types, padding in front of an observation, a patient without
            observation, decreasing or endless times, a gap longer than the encoder accepts, an end
            before the last observation, a value that is observed but not finite, or ``times`` that
            require a derivative.
    """
    check_shapes(times, values, observed, config.n_features)
    if until is not None:
        check_ends(until, len(times))
    hours, seen = _on_host(times.double()), _on_host(observed)
    gaps = check_series(hours, values, seen, config)
    present = np.logical_or.reduce(seen, axis=2)  # (B, L)
    waits = np.zeros(len(hours))
    if until is not None:
        waits = check_waits(_on_host(until.double()), hours, present, config)
    # (B, L + 1) each: to each observation from the one before, then to the end of the series.
    stops = np.column_stack([present, waits > 0])
    steps, dt = cut_gaps(np.column_stack([gaps, waits]), stops, config)

    done = steps.cumsum(axis=1)
    patients = np.argsort(-done[:, -1], kind="stable")  # by row of the state
    done, steps, dt = done[patients], steps[patients], dt[patients]
    total = done[:, -1]
    step = np.arange(total.sum()) - np.repeat(total.cumsum() - total, total)  # (N,)
    dt = np.repeat(dt.ravel(), steps.ravel())[np.argsort(step, kind="stable")]
    row, number = present[patients].nonzero()  # (P,) each, patient after patient
    arrival = done[row, number] - 1  # the step that ends at the observation
    order = np.argsort(arrival, kind="stable")  # from patient after patient to step after step
    row, number = row[order], number[order]
    time_features, index = build_time_features(
        patients[row], number, hours, seen, config.time_scale
    )
    latest = torch.from_numpy(index).to(values.device)
    n_active = np.bincount(step)
    return Plan(
        shape=(len(hours), hours.shape[1]),
        config=config,
        n_active=n_active.tolist(),
        n_observed=np.bincount(arrival, minlength=len(n_active)).tolist(),
        dt=torch.from_numpy(dt).to(config.dtype),
        rows=torch.from_numpy(row),
        observation_index=torch.from_numpy(patients[row] * hours.shape[1] + number),
        last_value=values.to(config.dtype)
        .take(latest.clamp(min=0))
        .masked_fill(latest < 0, math.nan),
        time_features=torch.from_numpy(time_features).to(config.dtype),
        ends=None if until is None else torch.from_numpy(np.argsort(patients)),
    )


def cut_gaps(
    gaps: NDArray[np.float64], stops: NDArray[np.bool_], config: SolverConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return number and scaled length of the solver steps of gaps in hours, (B, L + 1) each.

    Args:
        gaps: (B, L + 1).
        stops: (B, L + 1) whether something is behind the gap, which takes a step then, however
            short it is.
        config: of the encoder.
    """
    steps = np.maximum(np.ceil(gaps / (config.longest_step * config.time_scale)), 1) * stops
    return steps.astype(np.int64), gaps / (np.maximum(steps, 1) * config.time_scale)


def check_waits(
    until: NDArray[np.float64],
    hours: NDArray[np.float64],
    present: NDArray[np.bool_],
    config: SolverConfig,
) -> NDArray[np.float64]:
    """Return the hours from each last observation to the end ``until`` of the series, (B,) each.

    Raises:
        ValueError: an end before the last observation, or too long after it.
    """
    waits = until - hours[np.arange(len(hours)), present.sum(axis=1) - 1]
    early = ~(waits >= 0)  # or not a number
    _refuse(early, "the end {value} h of {place} is before its last observation", until)
    too_long = waits > config.longest_gap * config.time_scale
    _refuse(too_long, "the end {value} h of {place} needs a larger time_scale", until)
    return waits


def build_time_features(
    patient: NDArray[np.int64],
    number: NDArray[np.int64],
    hours: NDArray[np.float64],
    observed: NDArray[np.bool_],
    time_scale: float,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return ``Plan.time_features`` of some observations and where each latest value stands.

    Args:
        patient: (P,) whose observation.
        number: (P,) which of the patient's observations.
        hours: (B, L) of the observations.
        observed: (B, L, F).
        time_scale: hours; log hours are divided by its own logarithm.

    Returns:
        The time features (P, 3F + 3), and the index (P, F) of each feature's latest value in the
        flattened (B * L * F), -1 before the first.
    """
    size, length, n_features = observed.shape
    steps = np.arange(length)
    # Number of the latest measurement of each feature, of any feature, and of the first of all.
    # One row more than observations: the row in front of an observation holds what was before it.
    last = np.full((size, length + 1, n_features + 2), -1)
    measured = np.where(observed, steps[:, None], -1)
    last[:, 1:, :n_features] = np.maximum.accumulate(measured, axis=1, out=measured)
    last[:, 1:, n_features] = steps
    last[:, 1:, n_features + 1] = 0
    before = last[patient, number]
    now = last[patient, number + 1, :n_features]  # (P, F)
    since = np.where(before < 0, number[:, None], before)
    passed = hours[patient, number][:, None] - hours[patient[:, None], since]
    time_features = np.concatenate(
        [
            now == number[:, None],
            before[:, :n_features] >= 0,
            np.log1p(passed) / math.log1p(time_scale),
            np.log1p(number)[:, None],
        ],
        axis=1,
    )
    index = (patient * length)[:, None] + now
    return time_features, np.where(now < 0, -1, index * n_features + np.arange(n_features))


def check_series(
    hours: NDArray[np.float64], values: Tensor, seen: NDArray[np.bool_], config: SolverConfig
) -> NDArray[np.float64]:
    """Refuse series without meaning, by the first fault's value and place.

    Returns:
        The hours in front of each observation, (B, L), zero in padding and at the first.
    """
    present = np.logical_or.reduce(seen, axis=2)
    follows = np.ones_like(present)  # the place in front is no padding
    follows[:, 1:] = present[:, :-1]
    gaps = np.zeros_like(hours)
    with np.errstate(invalid="ignore", over="ignore"):  # times in padding may be anything
        np.subtract(hours[:, 1:], hours[:, :-1], out=gaps[:, 1:], where=present[:, 1:])
    not_finite = seen & ~_on_host(values.isfinite())

    _refuse(~present[:, :1], "no observation at {place}: padding stands behind a series")
    _refuse(present & ~follows, "padding in front of the observation at {place}")
    _refuse(present & ~np.isfinite(hours), "time {value} at {place} is not finite", hours)
    _refuse(gaps < 0, "time {value} h at {place} is before the time in front of it", hours)
    too_long = gaps > config.longest_gap * config.time_scale
    _refuse(too_long, "the gap of {value} h to {place} needs a larger time_scale", gaps)
    _refuse(not_finite, "value {value} at {place} is observed but not finite", values)
    return gaps


def check_shapes(times: Tensor, values: Tensor, observed: Tensor, n_features: int) -> None:
    """Refuse tensors that do not fit each other, and times that require a derivative."""
    if times.ndim != 2 or 0 in times.shape:
        raise ValueError(f"times must be (B, L) and not empty, got {tuple(times.shape)}")
    shape = (*times.shape, n_features)
    for name, tensor in (("values", values), ("observed", observed)):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if observed.dtype != torch.bool:
        raise ValueError(f"observed must be bool, got {observed.dtype}")
    if times.requires_grad and torch.is_grad_enabled():
        raise ValueError("the states have no derivative by times: call times.detach()")


def check_ends(until: Tensor, patients: int) -> None:
    """Refuse ends of series of another shape, or that require a derivative."""
    if tuple(until.shape) != (patients,):
        raise ValueError(f"until must be {(patients,)}, got {tuple(until.shape)}")
    if until.requires_grad and torch.is_grad_enabled():
        raise ValueError("the states have no derivative by until: call until.detach()")


def _refuse(
    bad: NDArray[np.bool_], message: str, source: NDArray[Any] | Tensor | None = None
) -> None:
    """Raise with the first True place of ``bad`` (B, ...), and the number there."""
    if not bad.any():
        return
    place = np.argwhere(bad)[0].tolist()
    value = None if source is None else source[tuple(place)].item()
    axes = zip(("patient", "observation", "feature"), place, strict=False)
    raise ValueError(message.format(value=value, place=", ".join(f"{n} {i}" for n, i in axes)))


def _on_host(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.numpy(force=True)
    return array
