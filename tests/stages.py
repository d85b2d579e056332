"""Stages as the script wires them from flags."""

import medgemma_trainer as trainer
from language_models import TINY_MODEL, patients
from medgemma_clinical.commands.command_line import build_parser
from medgemma_clinical.commands.run_folder import given_stage1, run_data

STAGE_1 = "--trajectory_only"
TINY = ("--model_name", TINY_MODEL, "--lora_dropout", "0")


def parsed(*flags, table=trainer.FLAGS):
    """Parse flags of the trainer, or of another command, as they are typed."""
    return build_parser("medgemma_trainer.py", "", table).parse_args(flags)


def arguments(*flags, output_dir=False):
    """Parse flags as a training does; its own output folder only where it is wanted."""
    args = parsed(*flags)
    folder = args.output_dir
    trainer.set_defaults(args)
    args.output_dir = args.output_dir if output_dir else folder
    return args


def data_for(args, dataset=None):
    """Prepare a data set, or what the flags name, as a run does."""
    read = trainer.read_dataset(args) if dataset is None else dataset
    return run_data(args, read, given_stage1(args))


def make_stage(args, data):
    """Wire the stage that the flags choose, on the stage 1 that they name."""
    return trainer.make_stage(args, data, given_stage1(args))


def train_epoch(stage, state, seed, epoch=1):
    """Take the steps of an epoch, and nothing else."""
    stage.batches["train"].set_epoch(seed, epoch)
    stage.begin_epoch(seed, epoch, [True for _ in {*state.members}])
    stage.model.train()
    for rows in stage.batches["train"]:
        trainer.step(state, *trainer.backward(stage, state, rows))


def stage1_of(args, data):
    """Return the stage 1 that a run would learn or read."""
    return trainer.make_stage1(args, data, given_stage1(args))


def stage_of_patients(*flags):
    """Wire a stage of a small model, without dropout, over the 24 patients."""
    args = arguments(*TINY, *flags)
    return make_stage(args, data_for(args, patients()))
