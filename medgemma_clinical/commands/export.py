"""Write a trained stage 2 or 3 for programs that serve language models: ``--export``."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.distributed import processes
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.merge import export_merged
from medgemma_clinical.models.checkpoints import MERGED_MODEL
from medgemma_clinical.provenance import peak_memory

logger = logging.getLogger(__name__)


def export(args: Namespace, given: set[str], encoders: Mapping[str, type]) -> int:
    """Write the language model with its adapter merged; the folder is whole or absent.

    Args:
        args: of the command line.
        given: flags that the user typed, as in ``--model_name``.
        encoders: class of each encoder by its registered name.

    Raises:
        InputError: the checkpoint has nothing to merge, or the folder cannot be written.
        RunFault: the folder that was read back computes other logits.
    """
    if processes().num_processes > 1:
        raise InputError("--export runs in one process: start it by python, not accelerate")
    name = args.model_name if "--model_name" in given else None
    proof = export_merged(args.checkpoint, args.export_dir, encoders, name)
    logger.info("proof: the folder was read back; %s", proof.describe())
    logger.info("export: %s, its %s/ for other programs", args.export_dir, MERGED_MODEL)
    logger.info("%s; medgemma_clinical/docs/serving.md says how to serve it", peak_memory())
    return EXIT_DONE
