"""Keywords of the functions that train from Python: flags of the command line, and an encoder."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medgemma_clinical.commands.run_folder import given_stage1
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.hub import find_checkpoint
from medgemma_clinical.inference.trajectory_model import TrajectoryModel
from medgemma_clinical.models.checkpoints import TrajectoryCheckpoint, read_trajectory
from medgemma_clinical.models.trained_model import checkpoint_place

NOT_KEYWORDS = {
    *("trajectory_only", "mode", "demo", "ablation", "arms", "reference", "compare", "seeds"),
    *("predict", "checkpoint", "predictions", "strict", "data_path", "data_dir", "dry_run"),
    *("show_values", "export", "export_dir", "explain", "patients", "open"),
}
"""Flags that choose another work, or what an argument of ``fit_trajectory`` says."""

OF_A_FOLDER = ("resume", "log_file", "report_to", "save_every", "report_patients")
"""Flags that have no use where nothing is written."""


def check_keywords(flags: Mapping[str, Any]) -> None:
    """Check that keywords are flags of a training, and that those of a folder have one.

    Raises:
        TypeError: another command's flag.
        InputError: a keyword that has no use without ``output_dir``.
    """
    if unknown := sorted(NOT_KEYWORDS & flags.keys()):
        raise TypeError(f"unexpected keyword {unknown[0]!r}")
    unused = sorted(name for name in OF_A_FOLDER if flags.get(name))
    if flags.get("output_dir") is None and unused:
        raise InputError(f"{', '.join(unused)}: give output_dir too, or leave it out")


def encoder_checkpoint(
    encoder: TrajectoryModel | str | Path | None, args: Namespace
) -> TrajectoryCheckpoint | None:
    """Return the trained stage 1 of ``encoder``, or of the flag ``ode_checkpoint``."""
    if encoder is None:
        return given_stage1(args)
    if isinstance(encoder, TrajectoryModel):
        return encoder.checkpoint()
    return read_trajectory(checkpoint_place(find_checkpoint(encoder, None)))
