"""What a run says: before its first step, of its speed, and at the end of each epoch."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from medgemma_clinical.commands.run_folder import log_path, stage_name
from medgemma_clinical.data.checks import describe_unusable_facts, summarize
from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.distributed import default_device, peak_memory, processes
from medgemma_clinical.evaluation.report_tables import counts_text
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import SKIPPED_ADVICE, Progress
from medgemma_clinical.training.trackers import check_tracker

logger = logging.getLogger(__name__)

PARTS = {
    "members": "encoder and head",
    "stage1": "stage 1",
    "projection": "projection",
    "llm": "LoRA adapter",
    "head": "head",
}
"""Names of a model's trainable parts."""

WARNED_SHARE = 0.01
"""An epoch with a larger share of skipped steps gets a warning."""


def log_run_summary(stage: Stage, data: Data, args: Namespace) -> None:
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
    rates = stage.learning_rates
    learns = {
        part: sum(p.numel() for p in getattr(stage.model, part).parameters() if p.requires_grad)
        for part in rates
    }
    shown = (f"{PARTS[part]} {n:,} at rate {rates[part]:g}" for part, n in learns.items() if n)
    logger.info("stage %s, trainable parameters: %s", stage.name, ", ".join(shown))
    train, steps = stage.batches["train"].rows, len(stage.batches["train"])
    if stage.text is not None:
        logger.info(
            "tokens: %s an epoch, of a patient median %.0f, longest %d, up to %d of them soft",
            f"{stage.lengths[train].sum():,}",
            np.median(stage.lengths[train]),
            stage.lengths[train].max(),
            stage.config["num_prefix_tokens"],
        )
        if stage.text.shortened:
            count = count_text(stage.text.shortened, data.min_cell)
            logger.info("%s prompts were too long and lost their oldest values", count)
    count = processes().num_processes
    logger.info(
        "batch size %d, %d steps an epoch, at most %d epochs, on %s, %d process%s",
        args.batch_size,
        steps,
        stage.epochs,
        default_device(),
        count,
        "" if count == 1 else "es",
    )


def log_epoch_time(stage: Stage, seconds: float, rows: Sequence[int]) -> None:
    """Log how long an epoch of a language model takes, from the time that some rows took."""
    if stage.text is None:
        return
    lengths, train = stage.lengths, stage.batches["train"].rows
    hours = seconds * lengths[train].sum() / lengths[rows].sum() / 3600 / processes().num_processes
    shown = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    logger.info("an epoch takes about %s, validation apart", shown)


def log_dry_run(stage: Stage, progress: Progress, rows: Sequence[int]) -> None:
    """Log what the steps of a dry run on some rows have cost, and an epoch's time by them."""
    logger.info(
        "dry run: %d steps on the longest rows, %.2f s each, loss %.4f; %s; nothing was written",
        progress.steps,
        progress.seconds / progress.steps,
        progress.mean_loss,
        peak_memory(),
    )
    log_epoch_time(stage, progress.seconds, rows)


def log_epoch(stage: Stage, metrics: dict[str, Any], *, improved: bool, exhausted: bool) -> None:
    """Log the metrics of an epoch, which are None where they are hidden."""
    epoch, skipped = metrics["epoch"], metrics["skipped_steps"]
    steps = len(stage.batches["train"])
    scores = "losses and AUROC not shown (--min_cell)"
    if not stage.hides_events:
        loss = "none" if metrics["train_loss"] is None else f"{metrics['train_loss']:.4f}"
        scores = f"train loss {loss}, val loss {metrics['val_loss']:.4f}, "
        scores += f"val AUROC {metrics['val_auroc']:.4f}"
    best = ", best so far" if improved else ""
    logger.info("epoch %d/%d: %s, %.1f s%s", epoch, stage.epochs, scores, metrics["seconds"], best)
    if skipped:
        level = logging.WARNING if skipped > WARNED_SHARE * steps else logging.INFO
        text = "epoch %d: %d of %d steps skipped, loss or gradient was not finite: %s"
        logger.log(level, text, epoch, skipped, steps, SKIPPED_ADVICE)
    if exhausted:
        logger.info("no better %s for %d epochs: stopped", stage.monitor, stage.patience)


def check_output(args: Namespace) -> None:
    """Check that log and tracker of a run can be had, before minutes go into the data.

    Raises:
        InputError: naming the flag.
    """
    check_tracker(args.report_to)
    if args.output_dir:
        log_path(args, args.output_dir / stage_name(args))
