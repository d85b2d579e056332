"""Explain the risk of single rows: over time, by series, by soft prompt, and in stage 3's words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray

from medgemma_clinical.data.facts import NUMBER_ENDING, numbers_as_written
from medgemma_clinical.data.scoring import ScoringRows
from medgemma_clinical.data.tables import Findings
from medgemma_clinical.data.texts import plain
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.patients.explanation import Explanation
from medgemma_clinical.evaluation.patients.report_marks import mark_numbers
from medgemma_clinical.inference.risk_over_time import risk_over_time
from medgemma_clinical.inference.scoring import score_rows
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trained_model import TrainedModel
from medgemma_clinical.models.trajectory import TrajectoryMember
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM


@dataclass(frozen=True)
class ScoredRow:
    """A row with a score.

    Attributes:
        id: as in the predictions.
        number: of the row in its file.
        dataset: this row alone, with the inputs of the model.
        probability: of the event.
        report: of stage 3.
        problem: of the report, as in the predictions.
    """

    id: str
    number: int
    dataset: TrajectoryDataset
    probability: float
    report: str | None = None
    problem: str = ""


def explain(row: ScoredRow, trained: TrainedModel, batch_size: int) -> Explanation:
    """Return what explains a row's risk.

    With a language model each observation and each series costs one more call of it.

    Args:
        row: to explain.
        trained: the model that scored the row, in evaluation mode.
        batch_size: rows a batch.

    Raises:
        InputError: a beginning of the row has no finite score.
    """
    dataset, one = row.dataset, np.zeros(1, dtype=np.int64)
    whole = ScoringRows(np.array([row.id]), np.array([row.number]), dataset, one, 1)
    (curve,) = risk_over_time(whole, trained, Findings(dataset.source), batch_size)
    return Explanation(
        id=row.id,
        probability=row.probability,
        features=dataset.features,
        units=dataset.units,
        times=dataset.times,
        values=dataset.values,
        references=tuple(map(dataset.reference, range(len(dataset.features)))),
        spreads=training_spreads(dataset, trained),
        observations=tuple(map(dataset.observation_text, range(len(dataset.times)))),
        hours=curve["hours"].to_numpy(),
        risks=curve["probability"].to_numpy(),
        facts=facts_read(dataset, trained),
        without=risks_without_series(dataset, trained, batch_size),
        without_soft_prompt=risk_without_soft_prompt(dataset, trained),
        report=None if row.report is None else mark_numbers(dataset, 0, row.report),
        problem=row.problem,
    )


def facts_read(dataset: TrajectoryDataset, trained: TrainedModel) -> dict[str, str]:
    """Return the facts of the first row in words; of a context's words those that stand in it."""
    shown, zero, unknown, words = {}, [], [], []
    written = numbers_as_written(dataset.contexts[0])
    for name, value in zip(dataset.fact_names, dataset.known_facts()[0], strict=True):
        if name in dataset.static_names:
            label = name.removeprefix("static_")
            if value == 0:
                zero.append(label)
            else:
                shown[label] = "unknown" if np.isnan(value) else short_number(value)
        elif name.endswith(NUMBER_ENDING):
            if np.isnan(value):
                unknown.append(f"{name.removesuffix(NUMBER_ENDING)} unknown")
        elif value == 1:
            words.append(name)
    if zero:
        shown["of value 0"] = ", ".join(zero)
    numbers = [number for name, number in written.items() if name in dataset.fact_names]
    if numbers or unknown:
        shown["numbers in the context"] = ", ".join(numbers + unknown)
    if words:
        shown["words in the context"] = ", ".join(words)
    reads_text = isinstance(trained.model, TrajectoryLLM) and trained.prompts.context
    if reads_text and dataset.contexts[0]:
        shown["context that the language model reads"] = dataset.contexts[0]
    return shown


def short_number(value: float) -> str:
    """Write a number with one decimal at most, or two significant digits where that is more."""
    return plain(round(value, 1) if abs(value) >= 1 else float(f"{value:.2g}"))


def training_spreads(dataset: TrajectoryDataset, trained: TrainedModel) -> NDArray[np.float64]:
    """Return how far the last values of each series lie apart between training rows.

    Args:
        dataset: with the inputs of the model.
        trained: the model, whose stage 1 keeps these scales for its summaries.

    Returns:
        (F,) standard deviations in raw units, NaN where unknown or zero.
    """
    model = trained.model
    stage1 = model.stage1 if isinstance(model, TrajectoryLLM) else model
    if stage1 is None:
        return np.full(len(dataset.features), np.nan)
    member = stage1.members[0]
    assert isinstance(member, TrajectoryMember)
    spreads = member.head.summary_scaler.std.double().cpu().numpy()
    names = dataset.summary_names()
    last = spreads[[names.index(f"{name} last") for name in dataset.features]]
    known = np.isfinite(last) & (last != 1.0)  # which stands for 0, see Scaler
    return np.where(known, last, np.nan)


def risks_without_series(
    dataset: TrajectoryDataset, trained: TrainedModel, batch_size: int
) -> dict[str, float | None]:
    """Score the first row with one measured series left out at a time, in the text too.

    Observations of that series alone are left out whole.

    Args:
        dataset: one row with the inputs of the model.
        trained: the model.
        batch_size: rows a batch.

    Returns:
        The probability by the name of the series, None where such a row cannot be scored; empty
        for a row with one series.
    """
    measured = [f for f, _, _ in dataset.measured(0)]
    if len(measured) == 1:
        return {}
    copies = dataset.subset(np.zeros(len(measured), dtype=np.int64))
    owner = np.repeat(np.arange(len(measured)), copies.lengths)
    copies.values[np.arange(len(owner)), np.array(measured)[owner]] = np.nan
    copies.keep_observations(np.asarray(~np.isnan(copies.values).all(axis=1)))
    places = np.arange(len(measured))
    names = [dataset.features[f] for f in measured]
    rows = ScoringRows(np.array(names), places, copies, places, len(places))
    scores = score_rows(rows, trained, Findings(dataset.source, strict=False), batch_size)
    scored = zip(scores.rows.places.tolist(), scores.probability.tolist(), strict=True)
    return dict.fromkeys(names) | {names[place]: risk for place, risk in scored}


@torch.no_grad()
def risk_without_soft_prompt(dataset: TrajectoryDataset, trained: TrainedModel) -> float | None:
    """Score the first row with its soft tokens removed; its text and stage 1's log-odds stay.

    Args:
        dataset: one row with the inputs of the model.
        trained: the model.

    Returns:
        The probability; None for a model without soft prompt, or whose language model has weight 0.
    """
    model = trained.model
    if not isinstance(model, TrajectoryLLM) or model.projection is None:
        return None
    if model.residual_weight == 0:
        return None
    assert trained.tokenizer is not None
    most = trained.config["max_text_tokens"]
    text = TextCollator(dataset, trained.tokenizer, trained.prompts, answers=False, max_tokens=most)
    batch = send_to_device(text([0]), trained.device)
    states = model.trajectory(batch)
    assert states is not None
    batch["states"], batch["trajectory_logit"] = states.states, states.logit
    batch["states_mask"] = torch.zeros_like(states.mask)
    logit = model(batch).logit.double().cpu().numpy()
    return float(trained.rule.probability(logit)[0])
