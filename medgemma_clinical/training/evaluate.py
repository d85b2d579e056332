"""Predictions of a model for a part of the data."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from medgemma_clinical.distributed import gather, progress, to_device
from medgemma_clinical.evaluation.predictions import Predictions


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    device: torch.device,
    title: str = "",
    most_batches: int | None = None,
) -> Predictions:
    """Return the predictions of each row, in the order of the data set.

    Losses are sums over terms, so the result does not depend on the batches. Each process takes its
    share of them; all get the whole.

    Args:
        model: maps a batch to an ``Output``.
        loader: of the part; its batches hold ``index`` and ``labels``.
        device: of the model.
        title: of the progress bar; none is shown without.
        most_batches: of this process, for a trial; None for all.
    """
    model.eval()
    total = len(loader) if most_batches is None else min(most_batches, len(loader))
    batches: Any = itertools.islice(loader, total)
    results = []
    for batch in progress(batches, title, total) if title else batches:
        output = model(to_device(batch, device))
        logit = output.logit.double().cpu().numpy()
        offset = torch.zeros_like(output.logit) if output.offset is None else output.offset
        columns = (
            batch["index"].numpy(),
            batch["labels"].double().numpy(),
            logit,
            offset.double().cpu().numpy(),
        )
        results.append((float(output.loss), int(output.terms), columns))
    losses, terms, columns = zip(*gather(results), strict=True)
    rows, labels, logits, offsets = (
        np.concatenate(column) for column in zip(*columns, strict=True)
    )
    order = np.argsort(rows)
    return Predictions(
        loss=sum(losses) / sum(terms),
        labels=labels[order],
        logit=logits[order],
        rows=rows[order],
        offset=offsets[order],
    )
