"""``export``: write a copy of a model to share, or stage 2 or 3 with LoRA merged."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

from medgemma_clinical.commands.command_line import EXIT_DONE, SHOW_VALUES, Table
from medgemma_clinical.commands.predict import CHECKPOINT, ENCODER, MODEL_NAME
from medgemma_clinical.flags import Flag

logger = logging.getLogger(__name__)

KINDS = "shared: what push_to_hub uploads; merged: stage 2 or 3 with LoRA merged"

FLAGS: Table = {
    "what to write": (
        Flag("kind", ("shared", "merged"), help=KINDS, positional=True),
        CHECKPOINT,
        Flag("out", Path, help="folder to write", required=True),
        MODEL_NAME,
        ENCODER,
        Flag("share_text", bool, help="shared: with regressions on texts, which hold their words"),
        SHOW_VALUES,
    ),
}


def run(args: Namespace, trainer: Any) -> int:
    """Write the copy."""
    from medgemma_clinical.distributed import computing  # with torch, once the flags are read
    from medgemma_clinical.inference.serving import export_merged

    with computing():
        if args.kind == "merged":
            export_merged(args.checkpoint, args.out, trainer.BUILDERS, args.model_name)
            return EXIT_DONE
        kind = trainer.TrajectoryModel
        model = kind.from_pretrained(args.checkpoint, model_name=args.model_name)
        model.save_shared(args.out, share_text=args.share_text)
        logger.info("export: %s", args.out)
    return EXIT_DONE
