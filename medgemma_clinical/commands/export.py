"""Write a trained stage 2 or 3 for programs that serve language models: ``--export``."""

from __future__ import annotations

import logging
from argparse import Namespace

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.distributed import peak_memory, processes
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.merge import export_merged
from medgemma_clinical.models.checkpoints import MERGED_MODEL
from medgemma_clinical.models.trained_model import Builders

logger = logging.getLogger(__name__)


def export(args: Namespace, given: set[str], builders: Builders) -> int:
    """Write the language model with its adapter merged; the folder is whole or absent.

    Args:
        args: of the command line.
        given: flags that the user typed, as in ``--model_name``.
        builders: of the script.

    Raises:
        InputError: the checkpoint has nothing to merge, or the folder cannot be written.
        RunFault: the folder that was read back computes other logits.
    """
    if processes().num_processes > 1:
        raise InputError("--export runs in one process: start it by python, not accelerate")
    name = args.model_name if "--model_name" in given else None
    proof = export_merged(args.checkpoint, args.export_dir, builders, name)
    logger.info("proof: the folder was read back; %s", proof.describe())
    logger.info("export: %s, its %s/ for other programs", args.export_dir, MERGED_MODEL)
    logger.info("%s; medgemma_clinical/docs/serving.md says how to serve it", peak_memory())
    return EXIT_DONE
