"""Explain the risk of single rows: over time, by series, by soft prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.texts import plain
from medgemma_clinical.data.trajectories import ScoringRows, TrajectoryDataset
from medgemma_clinical.evaluation.patients import Curves, Explanation
from medgemma_clinical.evaluation.text_features import WORDS
from medgemma_clinical.inference.scoring import rows_as_read, score_rows, text_collator
from medgemma_clinical.models import checkpoints
from medgemma_clinical.models.trained_model import TrainedModel
from medgemma_clinical.models.trajectory import TrajectoryMember
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

ROWS_AT_ONCE = 500
"""Rows whose prefixes are in memory at a time."""

CURVE_POINTS = 50
"""Of the cumulative incidences of a patient."""

MAX_EFFECTS, WINDOW_WORDS = 8, 8
"""Words, or windows, of a text that are named, and the words by which a window is named."""


def risk_over_time(
    rows: ScoringRows, trained: TrainedModel, findings: Findings, batch_size: int
) -> Iterator[pd.DataFrame]:
    """Yield the risk of rows as known after each observation; columns id, hours, probability."""
    dataset = rows_as_read(rows, trained.config, findings).dataset
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        part = dataset.subset(np.arange(start, min(start + ROWS_AT_ONCE, len(dataset))))
        cut, owner = prefixes(part)
        ids = rows.ids[start + owner]
        numbers = rows.numbers[start + owner]
        prefix_rows = ScoringRows(ids, numbers, cut, np.arange(len(owner)), rows.read)
        scores = score_rows(prefix_rows, trained, findings, batch_size)
        hours = cut.prediction_times()
        yield pd.DataFrame({"id": ids, "hours": hours, "probability": scores.probability})


def prefixes(dataset: TrajectoryDataset) -> tuple[TrajectoryDataset, NDArray[np.int64]]:
    """Return each series up to each observation, predicted there, and the (M,) source rows.

    The whole series follows where its own prediction time is later than its last observation.
    """
    lengths = dataset.lengths
    later = dataset.prediction_times() > dataset.times[dataset.offsets[1:] - 1]  # (N,)
    steps = lengths + later
    owner = np.repeat(np.arange(len(dataset)), steps)
    starts = np.cumsum(steps) - steps
    step = np.arange(len(owner)) - starts[owner]  # (M,) 0 for the first observation
    copies = dataset.subset(owner)
    cut = copies.up_to(step + 1)
    if copies.prediction_hours is not None:
        keeps = (step == lengths[owner]) | np.isnan(copies.prediction_hours)
        cut.prediction_hours = np.where(keeps, copies.prediction_hours, cut.last_times)
    return cut, owner


def explain(
    row: Mapping[str, Any], dataset: TrajectoryDataset, trained: TrainedModel, batch_size: int
) -> Explanation:
    """Explain a row of the prediction table; ``dataset`` holds it alone, as the model reads it."""
    zero = np.zeros(1, dtype=np.int64)
    rows = ScoringRows(np.array([row["id"]]), zero, dataset, zero, 1)
    (curve,) = risk_over_time(rows, trained, Findings(dataset.source), batch_size)
    series = dataset.series_read
    return Explanation(
        id=row["id"],
        probability=row["probability"],
        features=tuple(dataset.features[f] for f in series),
        units=tuple(dataset.units[f] for f in series),
        times=dataset.times,
        values=dataset.values[:, series],
        references=tuple(map(dataset.reference, series)),
        spreads=training_spreads(dataset, trained)[series],
        observations=tuple(map(dataset.observation_text, range(len(dataset.times)))),
        hours=curve["hours"].to_numpy(),
        risks=curve["probability"].to_numpy(),
        static={**static_read(dataset, trained), **text_effects(dataset, trained)},
        without={
            **risks_without_series(dataset, trained, batch_size),
            **risk_without_text(rows, trained, batch_size),
        },
        without_soft_prompt=risk_without_soft_prompt(dataset, trained),
        curves=curves_after(rows, trained, batch_size),
        report=row.get("report"),
        problem=row["problem"],
    )


def curves_after(rows: ScoringRows, trained: TrainedModel, batch_size: int) -> Curves | None:
    """Return the cumulative incidences after the prediction of the first row; None of a label."""
    if not trained.outcome.curve_end:
        return None
    events = CompetingEvents.from_config(trained.config["events"])
    hours = np.union1d(np.linspace(0, events.horizons[-1], CURVE_POINTS), events.horizons)
    scores = score_rows(rows, trained, Findings(rows.dataset.source), batch_size)
    incidence = scores.curves(hours.tolist())["incidence"].to_numpy()
    return Curves(events, hours, incidence.reshape(-1, len(hours)))


def static_read(dataset: TrajectoryDataset, trained: TrainedModel) -> dict[str, str]:
    """Return the static features of the first row as text, those of value 0 together."""
    texts: dict[str, str] = {}
    zeros: list[str] = []
    values = dataset.static_values()[0].tolist()
    for column, value in zip(dataset.static_inputs, values, strict=True):
        name = column.removeprefix("static_")
        if value == 0:
            zeros.append(name)
        else:
            texts[name] = short_number(value)
    if zeros:
        texts["0 or no"] = ", ".join(zeros)
    if isinstance(trained.model, TrajectoryLLM) and trained.prompts.context:
        texts["context that the language model reads"] = dataset.contexts[0]
    elif checkpoints.adds_text(trained.config):
        texts["text that is read"] = dataset.contexts[0]
    return {name: text for name, text in texts.items() if text}


def text_effects(dataset: TrajectoryDataset, trained: TrainedModel) -> dict[str, str]:
    """Return the words, or the windows, of the first row's text that move stage 1's risk most."""
    if not checkpoints.adds_text(trained.config):
        return {}
    assert trained.text is not None
    weight, reading = trained.config["residual_weight"], trained.text.reading
    coefficients = weight * trained.text.coefficients[0]
    if reading.kind == WORDS:
        weights = reading.table(dataset, slice(0, 1)).toarray()[0]
        names: Sequence[str] = reading.vocabulary
        effects = weights * coefficients
    else:
        encoder = trained.loaded_encoder()
        windows = encoder.windows([dataset.contexts[0]])
        if not windows:
            return {}
        sizes = np.array([len(window.ids) for window in windows])
        states = (encoder.means(windows).astype(np.float64) - reading.center) * reading.scale
        names = [encoder.words(window, WINDOW_WORDS) for window in windows]
        effects = sizes / sizes.sum() * (states @ coefficients)
    order = np.argsort(-np.abs(effects))[:MAX_EFFECTS]
    texts = [f"{names[k]} {effects[k]:+.2f}" for k in order if effects[k]]
    return {"What in the text moved the risk most, by log-odds": "; ".join(texts) or "nothing"}


def risk_without_text(
    rows: ScoringRows, trained: TrainedModel, batch_size: int
) -> dict[str, float | None]:
    """Return the risk of the first row with a usual text; empty where text adds nothing."""
    if not checkpoints.adds_text(trained.config):
        return {}
    scores = score_rows(rows, trained, Findings(rows.dataset.source), batch_size)
    assert scores.share is not None
    forecast = trained.outcome.moved(scores.stage_forecast, -scores.share)
    return {"text": float(trained.risks(trained.name, forecast)[0, 0])}


def short_number(value: float) -> str:
    """Write a number with one decimal at most, a small one with two significant digits."""
    if np.isnan(value):
        return "unknown"
    return plain(round(value, 1) if abs(value) >= 1 else float(f"{value:.2g}"))


def training_spreads(dataset: TrajectoryDataset, trained: TrainedModel) -> NDArray[np.float64]:
    """Return the standard deviation (F,) of each series' last training values; NaN if unknown."""
    model = trained.model
    stage1 = model.stage1 if isinstance(model, TrajectoryLLM) else model
    if stage1 is None:
        return np.full(len(dataset.features), np.nan)
    member, names = stage1.members[0], dataset.summary_names()
    assert isinstance(member, TrajectoryMember)
    spreads = member.head.summary_scaler.std.double().numpy(force=True)
    columns = [names.index(f"{name} last") for name in dataset.features]
    return np.where(np.isfinite(spreads[columns]), spreads[columns], np.nan)


def risks_without_series(
    dataset: TrajectoryDataset, trained: TrainedModel, batch_size: int
) -> dict[str, float | None]:
    """Score the first row without each of its series; None where it then has no score."""
    measured = np.array([f for f, _, _ in dataset.measured(0)])
    if len(measured) == 1:
        return {}  # nothing would be left
    copies = dataset.subset(np.zeros_like(measured))
    positions = np.arange(len(measured))
    owner = np.repeat(positions, copies.lengths)
    copies.values[np.arange(len(owner)), measured[owner]] = np.nan
    copies.keep_observations(np.asarray(~np.isnan(copies.values).all(axis=1)))
    names = np.array(dataset.features)[measured]
    rows = ScoringRows(names, positions, copies, positions, len(positions))
    scores = score_rows(rows, trained, Findings(dataset.source, strict=False), batch_size)
    scored_names = names[scores.rows.positions].tolist()
    risks: dict[str, float | None] = dict.fromkeys(names.tolist())
    risks.update(zip(scored_names, scores.probability.tolist(), strict=True))
    return risks


@torch.no_grad()
def risk_without_soft_prompt(dataset: TrajectoryDataset, trained: TrainedModel) -> float | None:
    """Score the first row without soft tokens; None where they have no effect."""
    model = trained.model
    if not isinstance(model, TrajectoryLLM) or model.projection is None:
        return None
    if model.residual_weight == 0:
        return None
    text = text_collator(dataset, trained)
    assert text is not None
    batch = send_to_device(text([0]), trained.device)
    states = model.trajectory(batch)
    assert states is not None
    batch["states"], batch["stage1_outputs"] = states.states, states.outputs
    batch["states_mask"] = torch.zeros_like(states.mask)
    outputs = model(batch).outputs.double().numpy(force=True)
    return float(trained.risks(trained.name, trained.outcome.forecast(outputs))[0, 0])
