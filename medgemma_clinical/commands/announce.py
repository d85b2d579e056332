"""What a run logs: before its first step, of its speed, and at the end of each epoch."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from medgemma_clinical.commands.run_folder import log_path, stage_name
from medgemma_clinical.data.checks import describe_split, describe_unusable_facts, summarize
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.distributed import default_device, peak_memory, processes
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import SKIPPED_ADVICE, Progress
from medgemma_clinical.training.trackers import check_tracker

logger = logging.getLogger(__name__)

WARNED_SHARE = 0.01
"""An epoch with a larger share of skipped steps gets a warning."""


def log_run_summary(stage: Stage, data: Data, args: Namespace) -> None:
    """Log data, split, model and length of the training."""
    dataset, train = data.dataset, stage.batches["train"]
    for line in [*summarize(dataset), describe_split(dataset, data.split, args.seed)]:
        logger.info(line)
    if "members" in stage.learning_rates or "stage1" in stage.learning_rates:
        until = "last observation" if dataset.hours_read is None else "prediction time"
        for line in describe_unusable_facts(dataset, data.split["train"]) * (args.facts == "on"):
            logger.warning("warning: %s: %s", dataset.source, line)
        facts = ", ".join(dataset.fact_names) or "none"
        logger.info("stage 1 reads the series up to the %s, and facts: %s", until, facts)
    learns = []
    for part, rate in stage.learning_rates.items():
        weights = [p.numel() for p in getattr(stage.model, part).parameters() if p.requires_grad]
        if weights:
            learns.append(f"{part} {sum(weights):,} at rate {rate:g}")
    logger.info("stage %s, trainable parameters: %s", stage.name, ", ".join(learns))
    if stage.text is not None:
        tokens, soft = stage.lengths[train.rows], stage.config["num_prefix_tokens"]
        text = "tokens: %s an epoch, of a patient median %.0f, longest %d, up to %d of them soft"
        logger.info(text, f"{tokens.sum():,}", np.median(tokens), tokens.max(), soft)
        if count := stage.text.shortened:
            logger.info("%s prompts were too long and lost their oldest values", f"{count:,}")
    count = processes().num_processes
    where = f"on {default_device()}, {count} process{'' if count == 1 else 'es'}"
    text = "batch size %d, %d steps an epoch, at most %d epochs, %s"
    logger.info(text, args.batch_size, len(train), stage.epochs, where)


def log_epoch_time(stage: Stage, seconds: float, rows: Sequence[int]) -> None:
    """Log how long an epoch of a language model takes, from the time that some rows took."""
    if stage.text is not None:
        lengths, train = stage.lengths, stage.batches["train"].rows
        minutes = seconds * lengths[train].sum() / lengths[rows].sum() / 60
        minutes /= processes().num_processes
        shown = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"
        logger.info("an epoch takes about %s, validation apart", shown)


def log_dry_run(stage: Stage, progress: Progress, rows: Sequence[int]) -> None:
    """Log what the steps of a dry run on some rows have cost, and an epoch's time by them."""
    took = progress.steps, progress.seconds / progress.steps, progress.mean_loss, peak_memory()
    text = "dry run: %d steps on the longest rows, %.2f s each, loss %.4f; %s; nothing was written"
    logger.info(text, *took)
    log_epoch_time(stage, progress.seconds, rows)


def log_epoch(stage: Stage, metrics: dict[str, Any], *, improved: bool, exhausted: bool) -> None:
    """Log the metrics of an epoch; without a finite step there is no training loss."""
    epoch, skipped, train_loss = (metrics[k] for k in ("epoch", "skipped_steps", "train_loss"))
    loss = "none" if train_loss is None else f"{train_loss:.4f}"
    scores = f"train loss {loss}, val loss {metrics['val_loss']:.4f}, "
    scores += f"val AUROC {metrics['val_auroc']:.4f}, {metrics['seconds']:.1f} s"
    best = ", best so far" if improved else ""
    logger.info("epoch %d/%d: %s%s", epoch, stage.epochs, scores, best)
    if skipped:
        steps = len(stage.batches["train"])
        level = logging.WARNING if skipped > WARNED_SHARE * steps else logging.INFO
        text = "epoch %d: %d of %d steps skipped, loss or gradient was not finite: %s"
        logger.log(level, text, epoch, skipped, steps, SKIPPED_ADVICE)
    if exhausted:
        logger.info("no better %s for %d epochs: stopped", stage.monitor, stage.patience)


def check_output(args: Namespace) -> None:
    """Refuse a log or tracker that cannot be had, before minutes go into the data."""
    check_tracker(args.report_to)
    if args.output_dir:
        log_path(args, args.output_dir / stage_name(args))
