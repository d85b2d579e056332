"""What a run says before its first step: data, split, model, texts; and the place of its log."""

from __future__ import annotations

import logging
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.commands.logs import check_log_file
from medgemma_clinical.data.checks import describe_unusable_facts, summarize
from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.distributed import default_device
from medgemma_clinical.evaluation.report_tables import counts_text
from medgemma_clinical.files import InputError
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM
from medgemma_clinical.training.stage import Stage

logger = logging.getLogger(__name__)

PARTS = {
    "members": "encoder and head",
    "stage1": "stage 1",
    "projection": "projection",
    "llm": "LoRA adapter",
    "head": "head",
}
"""Names of a model's trainable parts."""


def announce(stage: Stage, data: Data, args: Namespace) -> None:
    """Log data, split, model and length of the training."""
    dataset, hidden = data.dataset, data.hides_events
    for line in summarize(dataset, data.min_cell, events=not hidden):
        logger.info(line)
    parts = []
    for part, rows in data.split.items():
        events = None if hidden else int(dataset.labels[rows].sum())
        parts.append(f"{part} {counts_text(len(rows), events)}")
    logger.info("split: %s", "; ".join(parts))
    if not isinstance(stage.model, TrajectoryLLM) or stage.model.stage1 is not None:
        until = "last observation" if dataset.hours_read is None else "prediction time"
        facts = ", ".join(dataset.fact_names) or "none"
        unusable = describe_unusable_facts(dataset, data.split["train"], data.min_cell)
        for line in unusable if args.facts == "on" else []:
            logger.warning("warning: %s: %s", dataset.source, line)
        logger.info("stage 1 reads the series up to the %s, and facts: %s", until, facts)
    rates: dict[str, float] = stage.learning_rates
    learns = {
        part: sum(p.numel() for p in getattr(stage.model, part).parameters() if p.requires_grad)
        for part in rates
    }
    shown = (f"{PARTS[part]} {n:,} at rate {rates[part]:g}" for part, n in learns.items() if n)
    logger.info("stage %s, trainable parameters: %s", stage.name, ", ".join(shown))
    for line in stage.describe():
        logger.info(line)
    logger.info(
        "batch size %d, %d steps an epoch, at most %d epochs, on %s",
        args.batch_size,
        stage.steps_per_epoch,
        stage.epochs,
        default_device(),
    )


def describe_texts(
    collate: TextCollator, tokens: int, train: NDArray[np.int64], fewest: int
) -> list[str]:
    """Describe the tokens of a patient and the padding of a batch.

    Args:
        collate: of all rows.
        tokens: P.
        train: positions of the training part.
        fewest: patients of the smallest cell that is shown.
    """
    lengths = collate.lengths()
    lines = [
        f"tokens a patient: {tokens} soft, text median {np.median(lengths[train]):.0f}, longest "
        f"{lengths[train].max()}"
    ]
    if collate.shortened:
        count = count_text(collate.shortened, fewest)
        lines.append(f"{count} prompts were too long and lost their oldest values")
    return lines


def log_path(args: Namespace, folder: Path) -> Path | None:
    """Return the path of the run's log, None for none.

    Raises:
        InputError: no file can be written there, or what lies there is no log of this program.
    """
    if args.log_file == "none" or args.dry_run:
        return None
    if args.log_file == "auto":
        return folder / f"train_{datetime.now():%Y%m%d_%H%M%S}.log"
    path = Path(args.log_file)
    if not path.parent.is_dir():
        raise InputError(f"--log_file {path}: give a file in a folder that exists")
    if path.suffix != ".log" and path.absolute().parent == folder.absolute():
        raise InputError(f"--log_file {path}: a result may be written there: name it NAME.log")
    check_log_file(path)
    return path
