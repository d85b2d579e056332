"""``monitor``: judge a model after its go-live by its predictions and their outcomes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from medgemma_clinical.commands.command_line import (
    OUTPUT_DIR,
    SEED,
    SHOW_VALUES,
    Table,
    check_threshold,
)
from medgemma_clinical.commands.predict import CHECKPOINT
from medgemma_clinical.flags import Flag

FILE = Flag("predictions", Path, help="files of predict", several=True, positional=True)
OUTCOMES = "CSV of id, label and a date"

FLAGS: Table = {
    "files": (
        FILE,
        CHECKPOINT,
        Flag("outcomes", Path, help=OUTCOMES, required=True, metavar="CSV"),
        Flag("date", help="column of the date in it", required=True),
        OUTPUT_DIR,
        SHOW_VALUES,
    ),
    "what is judged": (
        Flag("period", ("week", "month", "quarter"), "month", "what is judged together"),
        Flag("use", str, None, "stage, best or a baseline; the one of `probability`"),
        Flag("threshold", check_threshold, None, "that of predict, where it was given"),
        Flag("site", str, None, "column of hospitals or units"),
        SEED,
    ),
}


def run(args: Namespace, trainer: Any) -> int:
    """Write ``monitor.html`` and ``monitor.csv``."""
    from medgemma_clinical.commands import monitoring  # with torch, once the flags are read

    return monitoring.run_monitor(args, trainer.DATASETS)
