"""What a run logs: before its first step, of its speed, and at the end of each epoch."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medgemma_clinical.commands.run_folder import log_path, write_history
from medgemma_clinical.data.checks import describe_split, describe_unusable, summarize
from medgemma_clinical.data.findings import log_warnings
from medgemma_clinical.data.leaks import describe_leaks
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.distributed import default_device, peak_memory, processes
from medgemma_clinical.evaluation.decision import Predictions
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import SKIPPED_ADVICE, Progress, describe_epochs
from medgemma_clinical.training.trackers import Track, check_tracker

logger = logging.getLogger(__name__)

WARNED_SHARE = 0.01
"""An epoch with a larger share of skipped steps gets a warning."""

MAX_SHOWN = 6
"""Epochs that the console shows at most, beside the last one."""


def log_run_summary(stage: Stage, data: Data, seed: int, *, facts: bool) -> None:
    """Log data, split, model and length of the training; ``facts``: stage 1 may read them."""
    log_data(data, seed)
    if {"members", "stage1"} & {*stage.learning_rates}:  # there is a stage 1
        log_stage1_inputs(data, facts=facts)
    learns = (
        f"{part} {sum(p.numel() for p in parameters):,} at rate {stage.learning_rates[part]:g}"
        for part, parameters in stage.learning_parts.items()
    )
    logger.info("stage %s, trainable parameters: %s", stage.name, ", ".join(learns))
    log_tokens(stage)
    epochs = f"at most {stage.epochs} epochs"
    if stage.final_epochs:
        final = describe_epochs(stage.final_epochs)
        epochs = f"{max(stage.final_epochs)} epochs, by the folds' losses; averaged: {final}"
    logger.info(
        f"batch size {stage.batch_size}, {len(stage.batches['train'])} steps an epoch, {epochs}, "
        f"on {default_device()}, processes: {processes().num_processes}"
    )


def log_data(data: Data, seed: int) -> None:
    """Log what the data hold, their split, and what looks wrong."""
    dataset = data.dataset
    for line in [*summarize(dataset), describe_split(dataset, data.split, seed)]:
        logger.info(line)
    log_warnings(describe_leaks(dataset, data.split["train"]), dataset.source)
    log_warnings(describe_unusable(data.unusable_series), dataset.source)


def log_stage1_inputs(data: Data, *, facts: bool) -> None:
    """Log what stage 1 reads."""
    dataset = data.dataset
    if facts:
        log_warnings(describe_unusable(data.unusable_static), dataset.source)
    until = "last observation" if dataset.hours_read is None else "prediction time"
    names = ", ".join(dataset.static_inputs) or "none"
    logger.info("stage 1 reads the series up to the %s, and static features: %s", until, names)
    if data.text_features != "none":
        logger.info("texts are read as %s", data.text_features)


def log_tokens(stage: Stage) -> None:
    """Log how many tokens a language model reads."""
    if stage.text is None:
        return
    tokens, soft = stage.lengths[stage.batches["train"].rows], stage.config["num_prefix_tokens"]
    logger.info(
        f"tokens: {tokens.sum():,} an epoch, of a patient median {np.median(tokens):.0f}, "
        f"longest {tokens.max()}, up to {soft} of them soft"
    )
    if count := stage.text.shortened:
        logger.info(f"{count:,} prompts were too long and lost their oldest values")


def log_epoch_time(stage: Stage, seconds: float, rows: Sequence[int]) -> None:
    """Log how long an epoch of a language model takes, from the time that some rows took."""
    if stage.text is not None:
        share = stage.lengths[rows].sum() / stage.lengths[stage.batches["train"].rows].sum()
        minutes = seconds / share / 60 / processes().num_processes
        duration = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"
        logger.info("an epoch takes about %s, without validation", duration)


def log_dry_run(stage: Stage, progress: Progress, rows: Sequence[int]) -> None:
    """Log what the steps of a dry run on some rows have cost, and an epoch's time by them."""
    logger.info(
        f"dry run: {progress.steps} steps on the longest rows, "
        f"{progress.seconds / progress.steps:.2f} s each, loss {progress.mean_loss:.4f}; "
        f"{peak_memory()}; nothing was written"
    )
    log_epoch_time(stage, progress.seconds, rows)


def record_epoch(
    stage: Stage,
    progress: Progress,
    predictions: Predictions | None,
    folder: Path | None,
    track: Track | None,
    *,
    exhausted: bool,
) -> None:
    """Add an epoch to the history, and log it; ``predictions`` are those of the validation part."""
    auroc = math.nan if predictions is None else stage.auroc(predictions)
    metrics: dict[str, Any] = {
        "epoch": progress.epoch + 1,
        "step": progress.steps,
        "train_loss": progress.mean_loss if progress.terms else None,
        "val_loss": predictions and predictions.loss,
        "val_auroc": auroc if math.isfinite(auroc) else None,
        "skipped_steps": progress.skipped,
        "seconds": round(progress.seconds, 3),
    }
    progress.history.append({**metrics})
    record_average(progress, folder)
    if track is not None:
        track({name: x for name, x in metrics.items() if x is not None}, progress.steps)
    log_epoch(stage, progress, exhausted=exhausted)


def record_average(progress: Progress, folder: Path | None) -> None:
    """Add the epochs that are averaged now, of any member, to the last line of the history."""
    averaged = sorted({*itertools.chain(*progress.averaged)})
    progress.history[-1]["averaged_epochs"] = averaged
    write_history(folder, progress.history)


def log_epoch(stage: Stage, progress: Progress, *, exhausted: bool) -> None:
    """Log the last line of the history, most epochs to the log file alone."""
    metrics = progress.history[-1]
    epoch, skipped, train_loss = (metrics[k] for k in ("epoch", "skipped_steps", "train_loss"))
    every = math.ceil(stage.epochs / MAX_SHOWN)
    on_console = exhausted or epoch == stage.epochs or epoch % every == 0
    loss = "none" if train_loss is None else f"{train_loss:.4f}"  # no step was finite
    val = "no validation part"
    if metrics["val_loss"] is not None:
        val = f"val loss {metrics['val_loss']:.4f}"
        if metrics["val_auroc"] is not None:
            val += f", val AUROC {metrics['val_auroc']:.4f}"
    logger.log(
        logging.INFO if on_console else logging.DEBUG,
        f"epoch {epoch}/{stage.epochs}: train loss {loss}, {val}, {metrics['seconds']:.1f} s"
        f", averaged: {describe_epochs(metrics['averaged_epochs'])}",
    )
    if skipped:
        steps = len(stage.batches["train"])
        level = logging.WARNING if skipped > WARNED_SHARE * steps else logging.INFO
        text = "epoch %d: %d of %d steps skipped, loss or gradient was not finite: %s"
        logger.log(level, text, epoch, skipped, steps, SKIPPED_ADVICE)
    if exhausted:
        logger.info("no lower validation loss for %d epochs: stopped", stage.patience)


def check_output(folder: Path | None, log_file: str, report_to: str) -> None:
    """Refuse a log or tracker that cannot be had, before minutes go into the data."""
    check_tracker(report_to)
    if folder:
        log_path(log_file, folder)
