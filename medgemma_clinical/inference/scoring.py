"""Score rows with a trained model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data import distributions
from medgemma_clinical.data.dka import Meaning
from medgemma_clinical.data.findings import Findings, log_warnings
from medgemma_clinical.data.table_files import as_frame
from medgemma_clinical.data.trajectories import ScoringRows, TrajectoryDataset
from medgemma_clinical.distributed import few_threads
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.report_review import review_report
from medgemma_clinical.evaluation.topics.written_reports import state_risk
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.generation import write_reports
from medgemma_clinical.models import checkpoints
from medgemma_clinical.models.checkpoints import Config
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trained_model import TrainedModel
from medgemma_clinical.models.trajectory import Stage1
from medgemma_clinical.models.trajectory_llm import LLMWriter
from medgemma_clinical.training.evaluate import outputs
from medgemma_clinical.training.loaders import LengthBatches

MAX_COMPARED = 100_000
"""Rows of a file that are compared with the training data, the first ones."""

NO_FORM = "the report does not have the expected form: do not rely on its text"
"""Problem of a row whose written report does not parse."""


def as_source(rows: object) -> Path | pd.DataFrame | TrajectoryDataset:
    """Return a caller's rows as a path, a DataFrame or a data set; refuse another type."""
    if isinstance(rows, (str, os.PathLike)):
        return Path(rows)
    source = as_frame(rows)
    if not isinstance(source, (pd.DataFrame, TrajectoryDataset)):
        raise InputError(
            f"rows of type {type(rows).__name__}: give a table, the path of a file or a folder, "
            "or a data set"
        )
    return source


def scoring_rows(
    source: Path | pd.DataFrame | TrajectoryDataset,
    config: Config,
    datasets: Mapping[str, type[TrajectoryDataset]],
    findings: Findings,
    max_rows: int,
    description: Meaning | None = None,
) -> Iterator[ScoringRows]:
    """Read rows as the checkpoint reads them, ``max_rows`` at a time; a data set is taken whole."""
    chunks: Iterable[ScoringRows]
    if isinstance(source, TrajectoryDataset):
        if description is not None:
            raise InputError("the data set has been read: leave description out")
        chunks = [_all_rows(source, config)]
    elif config["dataset"] not in datasets:
        raise InputError(f"{findings.source}: the model reads a data set {config['dataset']}")
    else:
        reader = datasets[config["dataset"]]
        chunks = reader.scoring_rows(source, config, findings, max_rows, description)
    medians: list[pd.DataFrame] = []
    for rows in chunks:
        if len(medians) * max_rows < MAX_COMPARED:  # files of any length fit
            inputs = rows.dataset.with_inputs(**config["inputs"])
            medians.append(distributions.row_medians(inputs))
        yield rows
    findings.misfits = distributions.compare(config.get("case_mix", {}), pd.concat(medians))
    log_warnings(findings.misfits, findings.source)


def _all_rows(source: TrajectoryDataset, config: Config) -> ScoringRows:
    """Return the rows of a data set that was read as the checkpoint's data were."""
    options = {
        **source.read_options,
        "features": list(source.features),
        "units": list(source.units),
        "outcome": source.outcome,
    }
    expected = {
        **config["read_options"],
        "features": config["features"],
        "units": config["units"],
        "outcome": config["outcome"],
    }
    for name, value in expected.items():
        if name != "label_column" and options.get(name) != value:
            problem = f"its {name}: {options.get(name)}, the model reads {value}"
            raise InputError(f"{source.source}: {problem}")
    dataset = copy.copy(source)
    dataset.question = config["question"]
    positions = np.arange(len(source))
    return ScoringRows(source.ids, positions, dataset, positions, len(source))


def count_implausible(dataset: TrajectoryDataset, findings: Findings) -> None:
    """Count the rows with a value outside the limits that are declared for its series."""
    owner = np.repeat(np.arange(len(dataset)), dataset.lengths)
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        limits = dataset.limits(f)
        if limits is None:
            continue
        low, high = limits
        outside = (dataset.values[:, f] < low) | (dataset.values[:, f] > high)
        allowed = f"{low:g} to {high:g} {unit}".rstrip()
        problem = f"hold values of {name} outside {allowed}: is the unit right?"
        findings.counts[problem] += len(np.unique(owner[outside]))


def rows_as_read(rows: ScoringRows, config: Config, findings: Findings) -> ScoringRows:
    """Return rows with the inputs of a model alone; one without a value of its series is noted."""
    rows = replace(rows, dataset=rows.dataset.with_inputs(**config["inputs"]))
    empty = rows.dataset.lengths == 0
    return rows.without(empty, "holds no value of a series that the model reads", findings)


@dataclass(frozen=True)
class Scores:
    """M rows with a score."""

    rows: ScoringRows
    stage_forecast: Array  # what the stage itself says, as ``models.outcome`` describes it
    text: TextCollator | None  # of the prompts; None for stage 1 and without rows
    positions: NDArray[np.int64]  # (M,) of the rows in ``text``
    trained: TrainedModel
    used: str  # name of the model whose risk is the probability
    share: Array | None = None  # (M, Q) what text adds to stage 1's outputs; None: nothing

    @cached_property
    def forecasts(self) -> dict[str, Array]:
        """What each model says: the stage, the baselines, the ensemble."""
        return self.trained.forecasts(self.rows.dataset, self.stage_forecast, self.share)

    @property
    def forecast(self) -> Array:
        """What the model says that is used."""
        if self.used == self.trained.name:
            return self.stage_forecast
        if np.isnan(self.forecasts[self.used]).any():
            source = self.rows.dataset.source
            raise InputError(f"{source}: lacks columns that {self.used} reads: add them")
        return self.forecasts[self.used]

    @cached_property
    def probability(self) -> Array:
        """Probability (M,) of the event, of times by the first horizon."""
        return self.trained.risks(self.used, self.forecast)[:, 0]

    def curves(self, hours: Sequence[float] | None = None) -> pd.DataFrame:
        """Return the cumulative incidences of the model that is used, a line each."""
        ids = self.rows.ids[self.rows.positions]
        return self.trained.curves(self.used, self.forecast, ids, hours)

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Whether the decision rule predicts the event, (M,)."""
        return self.probability >= self.trained.threshold(self.used)

    @property
    def verdicts(self) -> dict[int, bool]:
        """``positive`` by position in ``text``."""
        return dict(zip(self.positions.tolist(), self.positive.tolist(), strict=True))


def score_rows(
    rows: ScoringRows,
    trained: TrainedModel,
    findings: Findings,
    batch_size: int,
    use: str = "stage",
) -> Scores:
    """Score rows by the model ``use``; ``findings`` get the problem of each row without a score."""
    used = trained.model_named(use)
    rows = rows_as_read(rows, trained.config, findings)
    rows = replace(rows, dataset=trained.with_text(rows.dataset))
    count_unknown_static(rows.dataset, findings)
    if checkpoints.adds_text(trained.config):
        missing = "lack a text that the model reads: their risks are those of rows without one"
        findings.counts[missing] += int((rows.dataset.contexts == "").sum())
    model = trained.model
    stage1 = model if isinstance(model, Stage1) else model.stage1
    if stage1 is not None:
        max_gap = stage1.encoder.longest_gap_hours
        problem = f"more than {max_gap:g} h pass without an observation"
        rows = rows.without(rows.dataset.longest_gaps() > max_gap, problem, findings)
    text = text_collator(rows.dataset, trained)
    if text is not None and text.too_long:
        problem = f"its text is longer than {trained.config['max_text_tokens']} tokens"
        too_long = np.isin(np.arange(len(rows.dataset)), text.too_long)
        rows = rows.without(too_long, problem, findings)
        text = text_collator(rows.dataset, trained)
    lengths = rows.dataset.lengths if text is None else text.lengths()
    batches = LengthBatches(np.arange(len(lengths)), batch_size, lengths, shuffle=False)
    computed = np.empty((len(lengths), trained.outcome.width))
    share = np.zeros_like(computed)
    with few_threads(stage1=isinstance(model, Stage1)):
        for batch, output in outputs(model, batches, text or rows.dataset.collate):
            index = batch["index"].numpy()
            computed[index] = output.outputs.double().numpy(force=True)
            if output.offset is not None:
                share[index] = computed[index] - output.offset.double().numpy(force=True)
    if (added := trained.text_share(rows.dataset)) is not None:
        computed, share = computed + added, added
    finite = np.asarray(np.isfinite(computed).all(axis=1))
    rows = rows.without(~finite, "no finite score: its values are too extreme", findings)
    forecast = trained.outcome.forecast(computed[finite])
    kept = share[finite] if trained.adds_late else None
    return Scores(rows, forecast, text, np.flatnonzero(finite), trained, used, kept)


def text_collator(dataset: TrajectoryDataset, trained: TrainedModel) -> TextCollator | None:
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


def reports_of(scores: Scores, batch_size: int) -> list[str]:
    """Return the reports that stage 3 writes for scored rows, M texts, as it writes them."""
    if scores.text is None:
        return []
    model = scores.trained.model
    assert isinstance(model, LLMWriter)
    max_tokens = scores.trained.config["report_tokens"]
    reports = write_reports(model, scores.text, scores.verdicts, max_tokens, batch_size)
    return [reports[i] for i in scores.verdicts]


def with_risks(reports: list[str], scores: Scores) -> list[str]:
    """Return written reports, M texts, with the risk and its side of the threshold."""
    outcome = scores.rows.dataset.outcome
    threshold = scores.trained.threshold(scores.used)
    return [
        state_risk(text, outcome, risk, threshold)
        for text, risk in zip(reports, scores.probability.tolist(), strict=True)
    ]


def count_unknown_static(dataset: TrajectoryDataset, findings: Findings) -> None:
    """Count the rows that lack a static feature which a model reads."""
    for name, column in zip(dataset.static_inputs, dataset.static_values().T, strict=True):
        finding = f"lack the static feature {name}: taken as unknown"
        findings.counts[finding] += int(np.isnan(column).sum())


def prediction_table(
    rows: ScoringRows,
    trained: TrainedModel,
    findings: Findings,
    batch_size: int,
    use: str = "stage",
) -> tuple[pd.DataFrame, Scores]:
    """Return the rows of the prediction file, and the scores.

    Takes the problems of these rows out of the findings.
    """
    scores = score_rows(rows, trained, findings, batch_size, use)
    dataset, positions = scores.rows.dataset, scores.rows.positions
    columns: dict[str, Any] = {
        "probability": scores.probability,
        "prediction": pd.array(scores.positive.astype(np.int64), dtype="Int64"),
        **trained.risk_columns(scores.used, scores.forecast, ""),
    }
    reports: list[str] | None = None
    if isinstance(trained.model, LLMWriter):
        reports = reports_of(scores, batch_size)
        columns["report"] = np.array(with_risks(reports, scores), dtype=object)
    table = pd.DataFrame(columns, index=positions).reindex(range(len(rows.ids)))
    table.insert(0, "id", rows.ids)
    table["problem"] = [findings.problems.pop(number, "") for number in rows.numbers.tolist()]
    for i, text in enumerate(reports or ()):
        if not review_report(dataset, i, text).parses:
            table.loc[positions[i], "problem"] = NO_FORM
            findings.counts[f"have a score, but {NO_FORM}"] += 1
    risks: dict[str, Array] = {}
    for model, forecast in scores.forecasts.items():
        if model != trained.name or scores.used != trained.name:
            risks |= trained.risk_columns(model, forecast, f"_{trained.ending(model)}")
    return table.join(pd.DataFrame(risks, index=positions)), scores
