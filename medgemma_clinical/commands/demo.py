"""Run the three stages on the sample data with a small language model: ``--demo``."""

from __future__ import annotations

import logging
import sys
import webbrowser
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.logs import quiet_console
from medgemma_clinical.commands.several import auroc_of
from medgemma_clinical.distributed import processes
from medgemma_clinical.evaluation.topics.written_reports import written_sentence
from medgemma_clinical.files import read_json
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.language_model import DEMO
from medgemma_clinical.provenance import PACKAGE

logger = logging.getLogger(__name__)

SAMPLE_DATA = PACKAGE / "sample" / "physionet2012_bicarbonate.csv"
SETTINGS: dict[str, Any] = {"data_path": SAMPLE_DATA, "max_samples": 1000, "show_values": True}
"""Values of flags that all three stages share."""

STAGE_1_FLAGS: dict[str, Any] = {"trajectory_only": True, "trajectory_epochs": 10}
LANGUAGE_MODEL: dict[str, Any] = {"model_name": DEMO, "epochs": 2}


def run_demo(args: Namespace, train: Callable[[Namespace], int]) -> int:
    """Run the README's three training commands, print the pages; ``--open`` opens the first."""
    installed = Path(sys.argv[0]).stem == "medgemma-clinical"
    program = "medgemma-clinical" if installed else "python medgemma_trainer.py"
    shared = {name: getattr(args, name) for name in ("output_dir", "seed", "log_file")}
    encoder = {"ode_checkpoint": args.output_dir / TRAJECTORY_FILE}
    stages = {"trajectory": STAGE_1_FLAGS}
    for mode in ("classification", "generative"):
        stages[mode] = {"mode": mode, **LANGUAGE_MODEL, **encoder}
    for name, stage in stages.items():
        flags = {**stage, **shared, **SETTINGS}
        words = (f"--{k}" if value is True else f"--{k} {value}" for k, value in flags.items())
        logger.info("\n$ %s %s", program, " ".join(words))
        small = {"model_name": DEMO, "quantization": "none"}  # it is never quantised
        settings = {**vars(args), **small, "demo": False, **flags}
        with quiet_console():
            code = train(Namespace(**settings))
        if code:
            return code
        folder = args.output_dir / name
        metrics = read_json(folder / "metrics.json")
        unused = metrics.get("residual_weight") == 0
        whose = ", stage 1's: the language model has weight 0" if unused else ""
        logger.info("AUROC on the test part: %s%s", auroc_of(folder, "test"), whose)
        if sentence := written_sentence(metrics.get("reports")):
            logger.info("%s", sentence)
    pages = [args.output_dir / stage / "report.html" for stage in stages]
    logger.info("\nPages to open:\n%s", "\n".join(f"  {page}" for page in pages))
    first = args.open and processes().is_main_process
    if first and not webbrowser.open(pages[0].resolve().as_uri()):
        logger.warning("--open: no browser on this machine")
    return EXIT_DONE
