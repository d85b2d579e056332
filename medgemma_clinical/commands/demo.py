"""Run the three stages on the sample data with a tiny language model: ``--demo``."""

from __future__ import annotations

import logging
import sys
import webbrowser
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.distributed import processes
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.language_model import TINY
from medgemma_clinical.provenance import PACKAGE

logger = logging.getLogger(__name__)

SAMPLE_DATA = PACKAGE / "sample" / "physionet2012_bicarbonate.csv"
SETTINGS: dict[str, Any] = {"data_path": SAMPLE_DATA, "max_samples": 1000}
"""Values of flags that all three stages share."""

STAGE_1: dict[str, Any] = {"trajectory_only": True, "trajectory_epochs": 10}
LANGUAGE_MODEL: dict[str, Any] = {"model_name": TINY, "epochs": 4, "adapter_lr": 1e-2}


def run_demo(args: Namespace, train: Callable[[Namespace], int]) -> int:
    """Run the three training commands of the README, each shown as a user would type it.

    The list of the pages to open comes last; ``--open`` opens the first.
    """
    installed = Path(sys.argv[0]).stem == "medgemma-clinical"
    program = "medgemma-clinical" if installed else "python medgemma_trainer.py"
    shared = {name: getattr(args, name) for name in ("output_dir", "seed", "log_file")}
    encoder = {"ode_checkpoint": args.output_dir / TRAJECTORY_FILE}
    stages = {"trajectory": STAGE_1}
    for mode in ("classification", "generative"):
        stages[mode] = {"mode": mode, **LANGUAGE_MODEL, **encoder}
    for stage in stages.values():
        flags = {**stage, **shared, **SETTINGS}
        shown = (f"--{k}" if value is True else f"--{k} {value}" for k, value in flags.items())
        logger.info("\n$ %s %s", program, " ".join(shown))
        tiny = {"model_name": TINY, "quantization": "none"}  # it is never quantised
        own = {**vars(args), **tiny, "demo": False, **flags}
        if code := train(Namespace(**own)):
            return code
    pages = [args.output_dir / stage / "report.html" for stage in stages]
    logger.info("\nPages to open:\n%s", "\n".join(f"  {page}" for page in pages))
    first = args.open and processes().is_main_process
    if first and not webbrowser.open(pages[0].resolve().as_uri()):
        logger.warning("--open: no browser on this machine")
    return EXIT_DONE
