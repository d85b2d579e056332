"""Score rows with a trained model, and count what was scored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from medgemma_clinical.data.case_mix import bands_of, case_mix_of
from medgemma_clinical.data.tables import Findings
from medgemma_clinical.data.trajectories import ScoringRows, TrajectoryDataset
from medgemma_clinical.distributed import default_device, to_device
from medgemma_clinical.evaluation.cohort import Cohort
from medgemma_clinical.models.generation import write_reports
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trained_model import TrainedModel
from medgemma_clinical.models.trajectory_llm import LLMWriter
from medgemma_clinical.training.loaders import LengthBatches


def score_rows(
    rows: ScoringRows, trained: TrainedModel, findings: Findings, batch_size: int
) -> tuple[pd.DataFrame, ScoringRows]:
    """Score those of some rows that can be scored.

    Args:
        rows: of the input, in its order.
        trained: the model, in evaluation mode.
        findings: gets the problem of each row that cannot be scored; the problems of these rows
            are taken out of it.
        batch_size: rows a batch.

    Returns:
        The lines of the prediction file, one for each row of the input, and the rows with a score.

    Raises:
        InputError: a row cannot be scored, and the findings are strict.
    """
    rows = _without_long_gaps(rows, trained, findings)
    rows, text = _without_long_texts(rows, trained, findings)
    logit = compute_logits(trained.model, rows.dataset, text, batch_size)
    finite = np.isfinite(logit)
    rows = rows.without(~finite, "no finite score: its values are too extreme", findings)
    rule = trained.rule
    probability = rule.probability(logit[finite])
    verdicts = probability >= rule.threshold
    lines = pd.DataFrame({"id": rows.ids, "probability": np.nan})
    lines["prediction"] = pd.Series(pd.NA, index=lines.index, dtype="Int64")
    lines.loc[rows.places, "probability"] = probability
    lines.loc[rows.places, "prediction"] = verdicts.astype(int)
    if isinstance(trained.model, LLMWriter):
        lines["report"] = ""
        lines.loc[rows.places, "report"] = _reports(trained, rows.dataset, verdicts, batch_size)
    lines["problem"] = [findings.problems.pop(number, "") for number in rows.numbers.tolist()]
    return lines, rows


def _without_long_gaps(rows: ScoringRows, trained: TrainedModel, findings: Findings) -> ScoringRows:
    """Leave out rows with a gap between two observations that the encoder does not accept."""
    encoder = trained.model.encoder
    if encoder is None or not len(rows.dataset):
        return rows
    longest = float(getattr(encoder, "longest_gap_hours", np.inf))
    problem = f"two observations lie more than {longest:g} h apart"
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
        most_tokens=trained.config["max_text_tokens"],
        refuse_long=False,
    )


@torch.no_grad()
def compute_logits(
    model: torch.nn.Module,
    dataset: TrajectoryDataset,
    text: TextCollator | None,
    batch_size: int,
) -> NDArray[np.float64]:
    """Return the log-odds of each row (m,), scored in batches of rows of about equal length."""
    device = default_device()
    collate: Any = dataset.collate if text is None else text
    logit = np.empty(len(dataset))
    for indices in _batches(dataset, text, batch_size):
        output = model(to_device(collate(indices), device))
        logit[indices] = output.logit.double().cpu().numpy()
    return logit


def _batches(
    dataset: TrajectoryDataset, text: TextCollator | None, batch_size: int
) -> Iterable[list[int]]:
    """Return batches of all rows, sorted by their length in observations or tokens."""
    lengths = dataset.lengths if text is None else text.lengths()
    return LengthBatches(np.arange(len(dataset)), batch_size, lengths, shuffle=False)


def _reports(
    trained: TrainedModel,
    dataset: TrajectoryDataset,
    verdicts: NDArray[np.bool_],
    batch_size: int,
) -> list[str]:
    """Write a report of each row, whose verdict is that of the decision rule."""
    text = _text_collator(dataset, trained)
    if text is None or trained.tokenizer is None:
        return []
    assert isinstance(trained.model, LLMWriter)
    batches = _batches(dataset, text, batch_size)
    most = trained.config["report_tokens"]
    written = write_reports(trained.model, text, trained.tokenizer, batches, verdicts, most)
    return [written[i] for i in range(len(dataset))]


def count_implausible(dataset: TrajectoryDataset, findings: Findings) -> None:
    """Count the rows with a value outside the limits that are declared for its series."""
    owner = np.repeat(np.arange(len(dataset)), dataset.lengths)
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        limits = dataset.limits(f)
        if limits is None:
            continue
        outside = (dataset.values[:, f] < limits[0]) | (dataset.values[:, f] > limits[1])
        allowed = f"{limits[0]:g} to {limits[1]:g} {unit}".rstrip()
        problem = f"hold values of {name} outside {allowed}: is the unit right?"
        findings.counts[problem] += len(np.unique(owner[outside]))


class PredictionTally:
    """Count scored rows; 40 bytes for each row with a label, nothing for others.

    Attributes:
        rows: of the input.
        scored: rows with a probability.
        positive: rows at or above the threshold.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.rows = self.scored = self.positive = 0
        self._labels: list[NDArray[np.int8]] = []
        self._probabilities: list[NDArray[np.float64]] = []
        self._groups: list[NDArray[np.uint64]] = []
        self._people: list[pd.DataFrame] = []

    def add(self, lines: pd.DataFrame, rows: ScoringRows) -> None:
        """Count the lines that were written of some rows, all of ``rows.dataset`` with a score."""
        dataset = rows.dataset
        self.rows += len(lines)
        self.scored += len(rows.places)
        self.positive += int(lines["prediction"].eq(1).sum())
        known = ~np.isnan(dataset.labels)
        self._labels.append(dataset.labels[known].astype(np.int8))
        self._probabilities.append(lines["probability"].to_numpy(float)[rows.places[known]])
        # A hash has eight bytes, however long a patient's name.
        self._groups.append(pd.util.hash_array(dataset.groups[known].astype(object)))
        people = dataset.people()[known]
        self._people.append(people.astype({"observations": np.int32, "age": np.float32}))

    @property
    def labelled(self) -> int:
        """Scored rows with a label."""
        return sum(map(len, self._labels))

    @property
    def events(self) -> int:
        """Scored rows with label 1."""
        return int(sum(labels.sum() for labels in self._labels))

    def cohort(self) -> tuple[Cohort, dict[str, float]]:
        """Return the labelled rows, without ids, as a report judges them, and their case mix."""
        labels = np.concatenate(self._labels).astype(float)
        groups = np.concatenate(self._groups)
        people = pd.concat(self._people, ignore_index=True)
        cohort = Cohort(
            labels=labels,
            probability=np.concatenate(self._probabilities),
            groups=groups,
            ids=groups,
            subgroups=bands_of(people),
            baselines={},
        )
        return cohort, case_mix_of(people, labels, groups)
