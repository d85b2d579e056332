"""``demo``: the three stages on the sample data with a small language model."""

from __future__ import annotations

import logging
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

from medgemma_clinical.commands.command_line import EXIT_DONE, SEED, Table, build_parser
from medgemma_clinical.commands.logs import quiet_console
from medgemma_clinical.files import read_json
from medgemma_clinical.flags import Flag
from medgemma_clinical.models.choices import DEMO
from medgemma_clinical.provenance import PACKAGE

logger = logging.getLogger(__name__)

SAMPLE_DATA = PACKAGE / "sample" / "physionet2012_bicarbonate.csv"
OUTPUT_DIR = Path("./checkpoints_medgemma_demo")

FLAGS: Table = {
    "what to write": (
        Flag("output_dir", Path, OUTPUT_DIR, "run folder"),
        Flag("log_file", str, "auto", "log path (auto = timestamped, none = disable)"),
        SEED,
    ),
}


def stages(args: Namespace) -> dict[str, list[str]]:
    """Return the command line of each stage."""
    shared = ["--output_dir", args.output_dir, "--seed", args.seed, "--log_file", args.log_file]
    shared += ["--data_path", SAMPLE_DATA, "--max_samples", 1000, "--show_values"]
    # The file that stage 1 leaves, below the two others.
    model = ["--model_name", DEMO, "--epochs", 2, "--ode_checkpoint"]
    model += [args.output_dir / "medgemma_trajectory_best.pt"]
    words = {
        "trajectory": ["--trajectory_only", "--trajectory_epochs", 10],
        "classification": ["--mode", "classification", *model],
        "generative": ["--mode", "generative", *model],
    }
    return {stage: [*map(str, [*own, *shared])] for stage, own in words.items()}


def run(args: Namespace, trainer: Any) -> int:
    """Run the README's three training commands, and print where their pages are."""
    from medgemma_clinical.commands.prediction_files import auroc_of  # once flags are read
    from medgemma_clinical.distributed import check_launch, exact_kernels
    from medgemma_clinical.evaluation.topics.written_reports import written_sentence

    check_launch()
    parser = build_parser("medgemma-clinical train", "", trainer.FLAGS)
    for stage, words in stages(args).items():
        logger.info("\n$ medgemma-clinical train %s", shlex.join(words))
        settings = parser.parse_args(words)
        trainer.set_defaults(settings)
        with quiet_console(), exact_kernels():
            code: int = trainer.train(settings)
        if code:
            return code
        folder = args.output_dir / stage
        metrics = read_json(folder / "metrics.json")
        unused = metrics.get("residual_weight") == 0
        whose = ", stage 1's: the language model has weight 0" if unused else ""
        logger.info("AUROC on the test part: %s%s", auroc_of(folder, "test"), whose)
        if sentence := written_sentence(metrics.get("reports")):
            logger.info("%s", sentence)
    pages = "\n".join(f"  {args.output_dir / stage / 'report.html'}" for stage in stages(args))
    logger.info("\nPages to open:\n%s", pages)
    return EXIT_DONE
