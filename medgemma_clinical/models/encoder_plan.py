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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FEATURE_INPUTS, TIME_INPUTS = 3, 3
"""Columns of ``Plan.time_features``: for each feature, and for the observation as a whole."""


@dataclass(frozen=True)
class SolverConfig:
    """What an encoder reads, and how it cuts time into solver steps."""

    n_features: int  # F
    time_scale: float  # hours in one unit of the equation's time
    longest_step: float  # in units of time_scale; infinite where one call covers a gap
    longest_gap: float  # in units of time_scale; a longer gap is refused
    dtype: torch.dtype  # of the planned numbers and the encoder's weights


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked batch as a schedule of solver steps.

    The patients are sorted by their number of steps, so that those active in a step are the first
    rows of the state. Observations stand in the order of the steps that end at them, and within a
    step by row. Step 0 ends at every patient's first observation; no time passes in it. The last
    steps of a patient may lead behind the last observation, to the end of the series.

    Attributes:
        shape: (B, L) of the batch.
        n_active: how many patients take part in step 0, 1, 2, ...
        n_observed: how many of them reach an observation at its end.
        dt: (N,) length of each patient's step, step after step, in units of ``time_scale``.
        rows: (P,) int64, the row of the state that each observation updates.
        observation_index: (P,) int64, the position of each observation in the flattened (B * L).
        last_value: (P, F) each feature's latest value in raw units; NaN before its first.
        time_features: (P, 3F + 3): for each feature whether it is measured now, whether it was
            measured before, and the scaled log hours since then (zero where never); then scaled
            log gap, scaled log hours since the first observation, log count.
        ends: (B,) int64, the row of the state of each patient, which stays behind the patient's
            last step; None where no end of the series was given.
    """

    shape: tuple[int, int]
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
        moved: dict[str, Any] = {}
        for name, member in vars(self).items():
            if isinstance(member, Tensor):
                moved[name] = member.to(device, non_blocking=non_blocking)
        return replace(self, **moved)


def build_plan(
    times: Tensor, values: Tensor, observed: Tensor, config: SolverConfig, until: Tensor | None
) -> Plan:
    """Check a batch (see ``ClinicalODERNN.forward``); plan its steps on the host."""
    check_shapes(times, values, observed, config.n_features, until)
    hours = times.double().numpy(force=True)
    seen = observed.numpy(force=True)
    present = np.logical_or.reduce(seen, axis=2)  # (B, L)
    last_hours = hours[np.arange(len(hours)), present.sum(axis=1) - 1]
    ends = last_hours if until is None else until.double().numpy(force=True)
    with np.errstate(invalid="ignore", over="ignore"):  # times in padding may be anything
        gaps = np.diff(hours, axis=1, prepend=hours[:, :1])
        gaps = np.column_stack([np.where(present, gaps, 0.0), ends - last_hours])  # (B, L + 1)
    gaps[:, 0] = 0.0
    check_series(hours, gaps, present, config)
    if not bool((values.isfinite() | ~observed).all()):
        raise ValueError("a value is observed but not finite")
    # Something is behind each gap that ends at an observation, however short the gap is.
    stops = np.column_stack([present, gaps[:, -1] > 0])
    steps, dt = cut_gaps(gaps, stops, config)

    step_counts = steps.cumsum(axis=1)
    patients = np.argsort(-step_counts[:, -1], kind="stable")  # by row of the state
    step_counts, steps, dt = step_counts[patients], steps[patients], dt[patients]
    total = step_counts[:, -1]
    step = np.arange(total.sum()) - np.repeat(total.cumsum() - total, total)  # (N,)
    dt = np.repeat(dt.ravel(), steps.ravel())[np.argsort(step, kind="stable")]
    row, number = present[patients].nonzero()  # (P,) each, patient after patient
    arrival = step_counts[row, number] - 1  # the step that ends at the observation
    order = np.argsort(arrival, kind="stable")  # from patient after patient to step after step
    row, number = row[order], number[order]
    time_features, index = build_time_features(
        patients[row], number, hours, seen, config.time_scale
    )
    latest = torch.from_numpy(index).to(values.device)
    n_active = np.bincount(step)
    return Plan(
        shape=(len(hours), hours.shape[1]),
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

    Where ``stops`` (B, L + 1), the gap takes a step, however short it is.
    """
    steps = np.maximum(np.ceil(gaps / (config.longest_step * config.time_scale)), 1) * stops
    return steps.astype(np.int64), gaps / (np.maximum(steps, 1) * config.time_scale)


def build_time_features(
    patient: NDArray[np.int64],
    number: NDArray[np.int64],
    hours: NDArray[np.float64],
    observed: NDArray[np.bool_],
    time_scale: float,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return ``Plan.time_features`` of P observations, and the index (P, F) of each latest value.

    Observation ``number`` (P,) of ``patient`` (P,); ``hours`` (B, L) and ``observed`` (B, L, F).
    The index is into (B * L * F), -1 before the first value.
    """
    size, length, n_features = observed.shape
    steps = np.arange(length)
    # Number of the latest measurement of each feature, of any feature, and of the first of all.
    # One row more than observations: the row in front of an observation holds what was before it.
    latest = np.full((size, length + 1, n_features + 2), -1)
    measured = np.where(observed, steps[:, None], -1)
    latest[:, 1:, :n_features] = np.maximum.accumulate(measured, axis=1, out=measured)
    latest[:, 1:, n_features] = steps
    latest[:, 1:, n_features + 1] = 0
    before = latest[patient, number]
    now = latest[patient, number + 1, :n_features]  # (P, F)
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
    hours: NDArray[np.float64],
    gaps: NDArray[np.float64],
    present: NDArray[np.bool_],
    config: SolverConfig,
) -> None:
    """Refuse series without meaning: hours and present (B, L), gaps (B, L + 1)."""
    if not present[:, 0].all() or (present[:, 1:] & ~present[:, :-1]).any():
        raise ValueError("each series needs an observation, and padding only behind it")
    if not np.isfinite(hours[present]).all():
        raise ValueError("the time of an observation is not finite")
    if not (gaps >= 0).all():  # or not a number
        raise ValueError("times decrease, or a series ends before its last observation")
    longest = config.longest_gap * config.time_scale
    if gaps.max() > longest:
        raise ValueError(f"a gap of {gaps.max():g} h is above {longest:g} h: raise time_scale")


def check_shapes(
    times: Tensor, values: Tensor, observed: Tensor, n_features: int, until: Tensor | None
) -> None:
    """Refuse tensors that do not fit each other, and times that require a derivative."""
    if times.ndim != 2 or 0 in times.shape:
        raise ValueError(f"times must be (B, L) and not empty, got {tuple(times.shape)}")
    shape = (*times.shape, n_features)
    if values.shape != shape or observed.shape != shape or observed.dtype != torch.bool:
        raise ValueError(f"values, and observed, which is bool, must be {shape}")
    if until is not None and until.shape != shape[:1]:
        raise ValueError(f"until must be {shape[:1]}, got {tuple(until.shape)}")
    for name, hours in (("times", times), ("until", until)):
        if hours is not None and hours.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"the states have no derivative by {name}: call {name}.detach()")
