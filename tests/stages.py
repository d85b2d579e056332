"""Stages as the script wires them from flags."""

from __future__ import annotations

from argparse import Namespace

import medgemma_trainer as trainer
from language_models import patients
from medgemma_clinical.commands import stages as wiring
from medgemma_clinical.commands.run_folder import given_stage1, run_data
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from medgemma_clinical.training.stage import Stage

STAGE_1 = "--trajectory_only"
TINY = ("--model_name", "tiny", "--lora_dropout", "0")


def arguments(*flags: str) -> Namespace:
    """Parse flags as the program does."""
    return trainer.complete(trainer.build_parser().parse_args(flags))


def data_for(args: Namespace, dataset: TrajectoryDataset | None = None) -> Data:
    """Prepare a data set, or what the flags name, as a run does."""
    args.min_cell = 0
    read = trainer.read_dataset(args) if dataset is None else dataset
    return run_data(args, read, wiring.prompt_options(args), given_stage1(args))


def make_stage(args: Namespace, data: Data) -> Stage:
    """Wire the stage that the flags choose, on the stage 1 that they name."""
    return wiring.make_stage(args, data, trainer.ENCODERS, given_stage1(args))


def stage1_of(args: Namespace, data: Data) -> TrajectoryClassifier | None:
    """Return the stage 1 that a run would learn or read."""
    return wiring.stage1_of(args, data, trainer.ENCODERS, given_stage1(args))


def stage_of_patients(*flags: str) -> Stage:
    """Wire a stage of the tiny model, without dropout, over the sixteen patients."""
    args = arguments(*TINY, *flags)
    return make_stage(args, data_for(args, patients()))
