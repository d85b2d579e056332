"""One pass over rows, for validation and for prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from torch import nn

from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import compute_batches
from medgemma_clinical.evaluation.decision import Predictions
from medgemma_clinical.models.outcome import Outcome, first_auroc
from medgemma_clinical.models.trajectory import Output, Stage1, TrajectoryCollator
from medgemma_clinical.training.loaders import part_batches


def center(model: Stage1, data: Data, collate: TrajectoryCollator, batch_size: int) -> None:
    """Shift stage 1's logits until its risks of the training part agree with the events there.

    The noise of dropout, which evaluation lacks, raises the risks of a rare event.
    """
    targets = data.dataset.targets()
    batches = part_batches({"all": data.split["train"]}, batch_size)["all"]
    for member in model.alone():
        predictions = score_batches(member, batches, collate)
        shift = model.outcome.shift(predictions.outputs, targets[predictions.rows])
        member.shift(torch.from_numpy(shift))


def auroc_of(dataset: TrajectoryDataset, outcome: Outcome) -> Callable[[Predictions], float]:
    """Return what computes the AUROC of the first risk of some rows."""

    def auroc(predictions: Predictions) -> float:
        return first_auroc(outcome, dataset.observed(predictions.rows), predictions.outputs)

    return auroc


@torch.no_grad()
def outputs(
    model: nn.Module, batches: Iterable[list[int]], collate: Callable[[list[int]], Any]
) -> Iterator[tuple[Any, Output]]:
    """Yield each batch and its ``Output``, in evaluation mode; no process waits for another."""
    model.eval()
    device = next(model.parameters()).device

    def read(rows: list[int]) -> tuple[Any, Output]:
        batch = collate(rows)
        return batch, model(send_to_device(batch, device))

    for _, pair in compute_batches(batches, read):
        yield pair


def score_batches(
    model: nn.Module, batches: Iterable[list[int]], collate: Callable[[list[int]], Any]
) -> Predictions:
    """Return the predictions of all rows, in the order of the data set; all processes must call."""
    batch_results = []
    for batch, output in outputs(model, batches, collate):
        offset = torch.zeros_like(output.outputs) if output.offset is None else output.offset
        columns = [batch["index"], output.outputs, offset]
        arrays = [column.double().numpy(force=True) for column in columns]
        batch_results.append((output.loss.double().numpy(force=True), int(output.terms), arrays))
    # Each process has scored its share of the batches; all get the whole.
    losses, terms, parts = zip(*gather_object(batch_results), strict=True)
    rows, logits, offsets = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(rows)
    return Predictions(
        losses=sum(losses) / sum(terms),  # whatever the batches were
        outputs=logits[order],
        rows=rows[order].astype(np.int64),
        offset=offsets[order],
    )
