"""Write a trained stage 2 or 3 for programs that serve language models: ``--export``."""

from __future__ import annotations

import logging
from argparse import Namespace

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.distributed import peak_memory, processes
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.serving import export_merged
from medgemma_clinical.models.trained_model import Builders

logger = logging.getLogger(__name__)


def export(args: Namespace, given: set[str], builders: Builders) -> int:
    """Write the language model with its adapter merged; the folder is whole or absent."""
    if processes().num_processes > 1:
        raise InputError("--export runs in one process: start it by python, not accelerate")
    name = args.model_name if "--model_name" in given else None
    apart = export_merged(args.checkpoint, args.export_dir, builders, name)
    logger.info("largest difference of a logit after the merge: %.2g of their spread", apart)
    page = "medgemma_clinical/docs/sharing.md"
    logger.info("export: %s; %s; see %s", args.export_dir, peak_memory(), page)
    return EXIT_DONE
