"""Score rows with a trained model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.scoring import ScoringRows, count_unknown_facts
from medgemma_clinical.data.tables import Findings
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.files import InputError
from medgemma_clinical.models.generation import rows_at_once, write_reports
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trained_model import TrainedModel
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from medgemma_clinical.models.trajectory_llm import LLMWriter
from medgemma_clinical.training.evaluate import outputs
from medgemma_clinical.training.loaders import LengthBatches

NO_FORM = "the report does not have the expected form: do not rely on its text"
"""Problem of a row whose written report does not parse."""


def scoring_rows(
    source: Path | pd.DataFrame | TrajectoryDataset,
    config: dict[str, Any],
    datasets: Mapping[str, type[TrajectoryDataset]],
    findings: Findings,
    most: int,
) -> Iterator[ScoringRows]:
    """Read rows to be scored, ``most`` at a time; a data set is taken whole.

    Args:
        source: what the checkpoint's class of data reads, or a data set.
        config: of the checkpoint.
        datasets: class of each data set by its name.
        findings: gets the problems of rows that cannot be read.
        most: rows at a time.

    Raises:
        InputError: the rows are not those that the checkpoint reads, or cannot be read.
    """
    check_kind(source)
    if not isinstance(source, TrajectoryDataset):
        yield from datasets[config["dataset"]].scoring_rows(source, config, findings, most)
        return
    check_data_set(source, config)
    asked, places = copy.copy(source), np.arange(len(source))
    asked.question = config["question"]
    yield ScoringRows(source.ids, places, asked, places, len(source))


def check_kind(source: object) -> None:
    """Check that rows are of a kind that can be read.

    Raises:
        InputError: naming the kind.
    """
    if not isinstance(source, (str, os.PathLike, pd.DataFrame, TrajectoryDataset)):
        raise InputError(
            f"rows of type {type(source).__name__}: give a DataFrame, the path of a file or a "
            "folder, or a data set"
        )


def check_data_set(dataset: TrajectoryDataset, config: dict[str, Any]) -> None:
    """Check that a data set was read as the data of a checkpoint were.

    Raises:
        InputError: naming the difference.
    """
    read = {name: x for name, x in config["reading"].items() if name != "label_column"}
    expected = {"features": config["features"], "units": config["units"], **read}
    found = {"features": list(dataset.features), "units": list(dataset.units), **dataset.reading}
    for name, value in {**expected, "outcome": config["outcome"]}.items():
        own = dataset.outcome if name == "outcome" else found.get(name)
        if own != value:
            raise InputError(f"{dataset.source}: its {name}: {own}, the model reads {value}")
    words = {*config["inputs"]["facts"]} - {*dataset.static_names}
    if words and dataset.reads_contexts and not any(dataset.contexts):
        raise InputError(
            f"{dataset.source}: the model reads facts of the context, which no row has: fill "
            "clinical_context"
        )


def describe_source(source: Path | pd.DataFrame | TrajectoryDataset) -> str:
    """Return the name of rows to be scored, for errors."""
    if isinstance(source, TrajectoryDataset):
        return source.source
    return "DataFrame" if isinstance(source, pd.DataFrame) else str(source)


@dataclass(frozen=True)
class Scores:
    """Probabilities and decisions of the rows with a score.

    Attributes:
        rows: M rows with a score.
        probability: (M,) float64, of the event.
        alarms: (M,) bool, whether the decision rule predicts the event.
        text: collator of the prompts, None for stage 1 and without rows.
        positions: (M,) int64, places of the rows in ``text``.
    """

    rows: ScoringRows
    probability: NDArray[np.float64]
    alarms: NDArray[np.bool_]
    text: TextCollator | None
    positions: NDArray[np.int64]


def score_rows(
    rows: ScoringRows, trained: TrainedModel, findings: Findings, batch_size: int
) -> Scores:
    """Score rows; note the problem of each row without a score.

    Args:
        rows: of the input, in its order.
        trained: the model, in evaluation mode.
        findings: gets the problem of each row that cannot be scored.
        batch_size: rows a batch.

    Raises:
        InputError: a row cannot be scored, and the findings are strict.
    """
    dataset = rows.dataset.with_inputs(**trained.config["inputs"])
    count_unknown_facts(dataset, findings)
    rows = _without_long_gaps(replace(rows, dataset=dataset), trained, findings)
    rows, text = _without_long_texts(rows, trained, findings)
    lengths = rows.dataset.lengths if text is None else text.lengths()
    batches = LengthBatches(np.arange(len(lengths)), batch_size, lengths, shuffle=False)
    collate = rows.dataset.collate if text is None else text
    logit = np.empty(len(lengths))
    for batch, output in outputs(trained.model, batches, collate):
        logit[batch["index"].numpy()] = output.logit.double().numpy(force=True)
    finite = np.isfinite(logit)
    rows = rows.without(~finite, "no finite score: its values are too extreme", findings)
    probability = trained.rule.probability(logit[finite])
    alarms = probability >= trained.rule.threshold
    return Scores(rows, probability, alarms, text, np.flatnonzero(finite))


def prediction_lines(scores: Scores, findings: Findings) -> pd.DataFrame:
    """Return the lines of the prediction file, one for each row of the input.

    Args:
        scores: of the rows.
        findings: the problems of these rows are taken out of them.
    """
    rows = scores.rows
    lines = pd.DataFrame({"probability": scores.probability}, index=rows.places)
    lines["prediction"] = pd.array(scores.alarms.astype(np.int64), dtype="Int64")
    lines = lines.reindex(range(len(rows.ids)))
    lines.insert(0, "id", rows.ids)
    lines["problem"] = [findings.problems.pop(number, "") for number in rows.numbers.tolist()]
    return lines


def reports_of(scores: Scores, trained: TrainedModel, batch_size: int) -> list[str]:
    """Let stage 3 write the reports of scored rows, M texts."""
    if scores.text is None:
        return []
    assert isinstance(trained.model, LLMWriter)
    verdicts = np.zeros(len(scores.text.dataset), dtype=bool)
    verdicts[scores.positions] = scores.alarms
    max_tokens = trained.config["report_tokens"]
    at_once = max(batch_size, rows_at_once(trained.model, scores.text, max_tokens))
    batches = LengthBatches(scores.positions, at_once, scores.text.lengths(), shuffle=False)
    written = write_reports(trained.model, scores.text, batches, verdicts, max_tokens)
    return [written[i] for i in scores.positions.tolist()]


def prediction_table(
    rows: ScoringRows, trained: TrainedModel, findings: Findings, batch_size: int
) -> tuple[pd.DataFrame, ScoringRows]:
    """Score some rows; return the lines of the prediction file and the rows with a score.

    Arguments and errors are those of ``score_rows``. Stage 3 adds a column of reports; a row whose
    report does not have the expected form keeps its score, and has a problem.
    """
    scores = score_rows(rows, trained, findings, batch_size)
    lines = prediction_lines(scores, findings)
    if isinstance(trained.model, LLMWriter):
        reports = reports_of(scores, trained, batch_size)
        texts = pd.Series(reports, index=scores.rows.places, dtype=object)
        lines.insert(3, "report", texts.reindex(lines.index))
        dataset, places = scores.rows.dataset, scores.rows.places
        parses = [dataset.score_report(i, text).parses for i, text in enumerate(reports)]
        lines.loc[places[~np.array(parses, dtype=bool)], "problem"] = NO_FORM
        findings.counts[f"have a score, but {NO_FORM}"] += len(reports) - sum(parses)
    return lines, scores.rows


def _without_long_gaps(rows: ScoringRows, trained: TrainedModel, findings: Findings) -> ScoringRows:
    """Leave out rows with a gap between two observations that the encoder does not accept."""
    model = trained.model
    stage1 = model if isinstance(model, TrajectoryClassifier) else model.stage1
    if stage1 is None:
        return rows
    longest = stage1.encoder.longest_gap_hours
    problem = f"more than {longest:g} h pass without an observation"
    return rows.without(rows.dataset.longest_gaps() > longest, problem, findings)


def _without_long_texts(
    rows: ScoringRows, trained: TrainedModel, findings: Findings
) -> tuple[ScoringRows, TextCollator | None]:
    """Leave out rows whose text is too long; return the collator of the others."""
    text = _text_collator(rows.dataset, trained)
    if text is None or not text.too_long:
        return rows, text
    too_long = np.isin(np.arange(len(rows.dataset)), text.too_long)
    problem = f"its text is longer than {trained.config['max_text_tokens']} tokens"
    rows = rows.without(too_long, problem, findings)
    return rows, _text_collator(rows.dataset, trained)


def _text_collator(dataset: TrajectoryDataset, trained: TrainedModel) -> TextCollator | None:
    """Tokenise the texts of some rows; return None without rows or without language model."""
    if trained.tokenizer is None or not len(dataset):
        return None
    return TextCollator(
        dataset,
        trained.tokenizer,
        trained.prompts,
        answers=False,
        max_tokens=trained.config["max_text_tokens"],
        refuse_long=False,
    )


def count_implausible(dataset: TrajectoryDataset, findings: Findings) -> None:
    """Count the rows with a value outside the limits that are declared for its series."""
    owner = np.repeat(np.arange(len(dataset)), dataset.lengths)
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        if limits := dataset.limits(f):
            low, high = limits
            outside = (dataset.values[:, f] < low) | (dataset.values[:, f] > high)
            allowed = f"{low:g} to {high:g} {unit}".rstrip()
            problem = f"hold values of {name} outside {allowed}: is the unit right?"
            findings.counts[problem] += len(np.unique(owner[outside]))
