"""Fine-tune MedGemma on irregular clinical series: encoder, soft prompt, LoRA, three stages.

    python medgemma_trainer.py --demo      # all three on sample data, minutes on a laptop CPU

    python medgemma_trainer.py --trajectory_only --dataset dka --data_path FILE.csv
    python medgemma_trainer.py --mode classification --dataset dka --data_path FILE.csv \\
        --ode_checkpoint ./checkpoints_medgemma_dka/medgemma_trajectory_best.pt
    python medgemma_trainer.py --mode generative --dataset dka --data_path FILE.csv \\
        --ode_checkpoint ./checkpoints_medgemma_dka/medgemma_trajectory_best.pt
    python medgemma_trainer.py --predict --checkpoint ./checkpoints_medgemma_dka/classification \\
        --data_path NEW.csv --predictions OUT.csv

The way of a batch: series -> ClinicalODERNN -> one state per observation; then

    stage 1  trajectory       attention-pooled head -> logit
    stage 2  classification   <bos> [soft tokens] [text] -> LLM -> last position -> head -> logit
    stage 3  generative       <bos> [soft tokens] [text] [report] -> LLM -> lm_head on the report

This file holds the flags, the one training loop, ``TrajectoryModel`` for Python, and ``main``. All
else is in ``medgemma_clinical``; its docs/developing.md says where.

Letters: B patients, L observations, F features, H state, P soft tokens, D width of the LLM.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgemma_clinical.commands.command_line import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    MIN_CELL,
    POSITIVE,
    RATE,
    SHOW_VALUES,
    WHOLE,
    Help,
    Parser,
    check_flags,
    check_quantization,
    names,
    number,
    run_command,
)
from medgemma_clinical.commands.logs import RUN_LOG, command_logging, recorded
from medgemma_clinical.data.texts import SERIES_TEXT
from medgemma_clinical.distributed import (
    check_gpu,
    check_launch,
    default_device,
    processes,
    progress,
    sum_over_processes,
    to_device,
    without_sync,
)
from medgemma_clinical.files import InputError, owner_only
from medgemma_clinical.inference import trajectory_model
from medgemma_clinical.models.checkpoint_schema import (
    ATTENTIONS,
    BASE_WEIGHTS,
    DYNAMICS,
    LORA_RANK,
    MEMBERS,
    PREFIX_TOKENS,
    QUANTIZATIONS,
    SOFT_PROMPTS,
)
from medgemma_clinical.training.signals import SIGNALS

if TYPE_CHECKING:  # torch takes seconds to load: functions import what they need of it
    import pandas as pd

    from medgemma_clinical.data.training_data import Data
    from medgemma_clinical.data.trajectories import TrajectoryDataset
    from medgemma_clinical.evaluation.predictions import Predictions
    from medgemma_clinical.inference.trajectory_model import Rows
    from medgemma_clinical.models.checkpoints import TrajectoryCheckpoint
    from medgemma_clinical.training.checkpoint_store import CheckpointStore
    from medgemma_clinical.training.stage import Stage
    from medgemma_clinical.training.trackers import Track
    from medgemma_clinical.training.train_state import TrainState

logger = logging.getLogger("medgemma_trainer")


class Registry(Mapping[str, type]):
    """Classes by their name, each imported when it is asked for.

    Args:
        places: "module:Class" by name.
    """

    def __init__(self, places: dict[str, str]) -> None:
        """Import nothing yet."""
        self.places = places

    def __getitem__(self, name: str) -> type:
        """Return a class."""
        module, _, attribute = self.places[name].partition(":")
        found: type = getattr(import_module(module), attribute)
        return found

    def __iter__(self) -> Iterator[str]:
        """Return the names."""
        return iter(self.places)

    def __len__(self) -> int:
        """Return the number of classes."""
        return len(self.places)


DATASETS: Mapping[str, Any] = Registry(
    {
        "dka": "dataset_format:MIMICtrajectoryDataset",
        "srtr": "srtr_dataset:SRTRTrajectoryDataset",
    }
)
"""Class of each kind of data, by ``--dataset``."""

ENCODERS: Mapping[str, Any] = Registry({"ode_rnn": "dte_encoder:ClinicalODERNN"})
"""Class of each encoder, by its registered name; a new stage 1 takes the first."""

DEFAULT_MODEL = "google/medgemma-4b-pt"
SWITCH = ("on", "off")

LARGEST_NORM = 1.0
"""Gradients of a larger norm are scaled down to it."""

# --------------------------------------------------------------------------- flags


def build_parser() -> Parser:
    """Return the parser; every default of the program is written here or below, and only there."""
    from medgemma_clinical.data.small_cells import FEWEST

    parser = Parser(
        prog="medgemma_trainer.py",
        description="Fine-tune MedGemma on irregular clinical series, in three stages.",
        usage="python medgemma_trainer.py [flags]",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to do").add_argument
    add("--trajectory_only", action="store_true", help="stage 1: train ODE-RNN only, skip LLM")
    add(
        "--mode",
        choices=("classification", "generative"),
        default="classification",
        help="stage 2 or 3",
    )
    add("--demo", action="store_true", help="all three stages on sample data with the tiny model")
    add("--open", action="store_true", help="--demo: open its first page in the browser")
    add("--ablation", action="store_true", help="train and compare models that lack one part each")
    add("--arms", type=names, metavar="NAME,NAME", help="--ablation: make these arms alone")
    add("--reference", default="stage 1", metavar="NAME", help="--ablation: arm or baseline")
    add("--compare", type=Path, nargs="+", metavar="RUN", help="compare stage folders, paired")
    add("--seeds", type=POSITIVE, metavar="N", help="the same with N seeds from --seed on, pooled")
    add("--predict", action="store_true", help="score new rows with a trained model")
    add("--export", choices=("merged",), help="write stage 2 or 3 with LoRA merged, for servers")
    add("--export_dir", type=Path, help="--export: the folder to write")
    add("--checkpoint", type=Path, help="--predict, --export: a stage folder, or stage 1's .pt")
    add("--predictions", type=Path, help="--predict: the CSV to write")
    add("--strict", action="store_true", help="--predict: refuse a file with a row it cannot score")
    add("--explain", action="store_true", help="--predict: a page of patients beside the CSV")
    add("--patients", type=names, metavar="ID,ID", help="--explain: these rows, not the riskiest")
    add_data_flags(parser)
    add_training_flags(parser)
    add_model_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, help="./checkpoints_medgemma_{dataset} when not given")
    add("--report_patients", action="store_true", help="name patients in report.html")
    add("--min_cell", type=WHOLE, default=FEWEST, help=MIN_CELL)
    add("--dry_run", action="store_true", help="take two steps, measure memory, write nothing")
    add("--log_file", default="auto", help="log path (auto = timestamped, none = disable)")
    add(
        "--report_to",
        choices=("none", "tensorboard", "wandb", "mlflow"),
        default="none",
        help="tracker that gets the figures",
    )
    add("--resume", action="store_true", help="continue the same command's run that was stopped")
    add("--deterministic", action="store_true", help="on a GPU: only exactly repeatable kernels")
    add("--save_every", type=WHOLE, default=0, metavar="STEPS", help="keep the state within epochs")
    return parser


def add_data_flags(parser: Parser) -> None:
    """Add the flags of the data and of their texts."""
    from medgemma_clinical.data.dka.description import LABEL
    from srtr_dataset import ORGANS

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=tuple(DATASETS), default="dka", help="kind of data")
    add("--organ", choices=tuple(ORGANS), default="kidney", help="SRTR only")
    add("--data_path", type=Path, default=Path("dka_training_data.csv"), help="path to DKA CSV")
    add("--data_dir", type=Path, help="path to SRTR data directory")
    add("--landmark_days", type=WHOLE, help="SRTR: asked so long after listing; 365, liver 90")
    add("--horizon_days", type=POSITIVE, help="SRTR: days looked ahead; 365, liver 90")
    add(
        "--transplant",
        choices=("negative", "exclude"),
        default="negative",
        help="SRTR: a transplant within the horizon is label 0, or left out",
    )
    add("--label_column", default=LABEL, metavar="NAME", help="DKA: column of 0 and 1 to learn")
    add("--allow_duplicates", action="store_true", help="DKA: allow equal rows across the split")
    add("--series", type=names, metavar="NAME,NAME", help="DKA: read these series only")
    add(
        "--max_len",
        type=POSITIVE,
        help="most recent observations kept; 20, of several series 64, SRTR 50",
    )
    add("--series_text", choices=SERIES_TEXT, default="all", help="series in the LLM's text")
    add("--text_context", choices=("full", "none"), default="full", help="context in the text")
    add("--max_text_tokens", type=POSITIVE, help="longer prompts lose each series' oldest values")
    add("--max_samples", type=WHOLE, default=10000, help="max patients (0 = all)")
    add("--show_values", action="store_true", help=SHOW_VALUES)


def add_training_flags(parser: Parser) -> None:
    """Add the flags of length, rate and seed of the training."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=POSITIVE, default=10, help="training epochs of stages 2 and 3")
    add("--trajectory_epochs", type=POSITIVE, default=100, help="training epochs of stage 1")
    add("--batch_size", type=POSITIVE, default=16, help="patients a batch")
    add("--gradient_accumulation", type=POSITIVE, default=1, help="batches a step, stages 2 and 3")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    add("--patience", type=POSITIVE, default=10, help="early stopping patience in epochs")
    add(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=0,
        help="of split, initialisation, order, bootstrap",
    )
    add(
        "--calibrate",
        choices=("none", "platt"),
        default="none",
        help="recalibrate on the validation part",
    )
    add("--encoder_lr", type=RATE, default=2e-3, help="learning rate of the ODE-RNN and its head")
    add("--head_lr", type=RATE, default=1e-3, help="learning rate of stage 2's head")


def add_model_flags(parser: Parser) -> None:
    """Add the flags of encoder and language model."""
    add = parser.add_argument_group("ODE-RNN").add_argument
    add("--ode_checkpoint", type=Path, help="pretrained ODE-RNN .pt (auto-freezes ODE-RNN)")
    add("--freeze_ode", action="store_true", help="freeze ODE-RNN without loading checkpoint")
    add(
        "--time_scale",
        type=number(float, 0, open_low=True),
        help="ODE-RNN time normalization in hours; JSON or 72.0 (DKA), 8760 (kidney), 2160 (liver)",
    )
    add("--solver", type=solver_name, default="rk4", help="rk4, or any method of torchdiffeq")
    add("--dynamics", choices=DYNAMICS, default="ode", help="between two observations")
    add("--members", type=number(int, *MEMBERS), default=1, help="encoders that are averaged")
    add("--facts", choices=SWITCH, default="on", help="facts of the patient are inputs")
    add("--prediction_time", choices=SWITCH, default="on", help="carry the state to it, if known")
    add = parser.add_argument_group("language model").add_argument
    add("--model_name", default=DEFAULT_MODEL, help="a Gemma 3: hub id, folder, or tiny")
    add(
        "--quantization",
        type=check_quantization,
        choices=QUANTIZATIONS,
        help="nf4 on CUDA, none elsewhere, when not given",
    )
    add(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="float16 overflows in Gemma 3",
    )
    add("--attention", choices=ATTENTIONS, default=ATTENTIONS[0], help="kernels of the LLM")
    add("--base_weights", choices=BASE_WEIGHTS, default="pretrained", help="random: a control")
    add("--soft_prompt", choices=SOFT_PROMPTS, default="on", help="shuffled: soft tokens of others")
    add(
        "--stage1_logit", choices=SWITCH, default="on", help="stage 1's logit is added to the LLM's"
    )
    add(
        "--num_prefix_tokens",
        type=number(int, *PREFIX_TOKENS),
        default=8,
        help="soft tokens: the latest states",
    )
    add("--projection_lr", type=RATE, default=1e-3, help="learning rate of the projection")
    add("--adapter_lr", type=RATE, default=2e-4, help="learning rate of the LoRA adapter")
    add("--lora_rank", type=number(int, *LORA_RANK), default=8, help="LoRA r")
    add("--lora_alpha", type=POSITIVE, default=16, help="LoRA alpha")
    add("--lora_dropout", type=number(float, 0, 0.99), default=0.05, help="LoRA dropout")


def solver_name(text: str) -> str:
    """Check the name of an ODE solver; used as an argparse type."""
    if text != "rk4":  # the encoder's own solver needs no torchdiffeq
        from dte_encoder import check_solver

        try:
            check_solver(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


# --------------------------------------------------------------------------- data


def read_dataset(args: argparse.Namespace) -> TrajectoryDataset:
    """Read the user's data with the flags that their kind knows.

    Raises:
        InputError: nothing to read, or a flag of another kind of data.
    """
    kind = DATASETS[args.dataset]
    source = getattr(args, kind.source_flag)
    if source is None or not os.path.exists(source):  # False also for a name that is too long
        problem = f"--dataset {args.dataset}" if source is None else f"{source}: no such file"
        raise InputError(f"{problem}: give the data by --{kind.source_flag}")
    return read_source(source, args)


def read_source(source: Path | pd.DataFrame, args: argparse.Namespace) -> TrajectoryDataset:
    """Read a file, a folder or a DataFrame with the flags that its kind of data knows.

    Raises:
        InputError: the data cannot be read, or a flag is of another kind of data.
    """
    kind = DATASETS[args.dataset]
    known = {*kind.options, kind.source_flag}
    others = {o for each in DATASETS.values() for o in (*each.options, each.source_flag)} - known
    for option in sorted(others):
        if getattr(args, option) != build_parser().get_default(option):
            raise InputError(f"--{option}: not for --dataset {args.dataset}: leave it out")
    options = {option: getattr(args, option) for option in kind.options}
    dataset: TrajectoryDataset = kind(
        source, **{name: value for name, value in options.items() if value is not None}
    )
    return dataset


# --------------------------------------------------------------------------- the one loop


def fit(
    stage: Stage,
    seed: int,
    folder: Path | None = None,
    track: Track = lambda figures, step: None,
    *,
    resume: bool = False,
    save_every: int = 0,
) -> TrainState:
    """Train with early stopping; leave the model with the weights of its best epoch.

    In a folder, the state is kept before the first step, before each validation, at the end, every
    ``save_every`` steps and when a signal comes. Processes share each batch; the first one writes.

    Args:
        stage: what learns from what.
        seed: of the order of the rows.
        folder: of the stage, for the best weights, their history and the states; None keeps none.
        track: gets the figures of each epoch.
        resume: continue from the newest state.
        save_every: steps between states within an epoch, 0 for none.

    Raises:
        NonFiniteLossError: the loss is no longer finite.
        Stopped: a signal came; the state is kept.
    """
    from medgemma_clinical.commands.run_folder import checkpoint_store
    from medgemma_clinical.training.resume import resume_training
    from medgemma_clinical.training.train_state import Stopwatch, copy_into, set_up_training

    state, watch = set_up_training(stage, default_device()), Stopwatch()
    store = checkpoint_store(folder) if folder else None

    def save() -> None:
        state.progress.seconds += watch.lap()
        save_state(stage, state, store)

    def after_step() -> None:
        signal = SIGNALS.pending()
        if signal or (save_every and state.average.steps % save_every == 0):
            save()
        SIGNALS.obey(signal)

    if resume and store:
        resume_training(stage, state, store.newest())
        save_best(stage, state, folder)
    else:
        save()
    ended_before = state.progress.over
    while not state.progress.over:
        with SIGNALS.deferred():
            train_epoch(stage, state, seed, after_step)
            save()
        predictions = validate(stage, state)
        state.progress.seconds += watch.lap()
        end_epoch(stage, state, folder, predictions, track)
    if not ended_before:
        save()
    copy_into(state.parameters, state.best)
    return state


def train_epoch(
    stage: Stage, state: TrainState, seed: int, after_step: Callable[[], None] = lambda: None
) -> None:
    """Pass over the training part, or over what is left of the epoch.

    Args:
        stage: what learns from what.
        state: goes on from its progress.
        seed: of the run; the order depends on it and the number of the epoch.
        after_step: called after each optimizer step.
    """
    from medgemma_clinical.training.loaders import batches_of

    stage.model.train()
    loader, device = stage.loaders["train"], default_device()
    epoch, done, total = state.stopping.epoch + 1, state.progress.batches, len(loader)
    batches_of(loader).set_epoch(seed, epoch, done)
    state.optimizer.zero_grad()
    loss, terms = 0.0, 0
    shown = progress(loader, f"{stage.name} {epoch}/{stage.epochs}", total, done)
    for count, batch in enumerate(shown, done + 1):
        steps = count % stage.accumulate == 0 or count == total
        state.progress.see(batch)
        with nullcontext() if steps else without_sync(state.model):
            output = state.model(to_device(batch, device))
            output.loss.backward()
        loss, terms = loss + float(output.loss.detach()), terms + output.terms
        if steps:
            train_step(state, loss, terms)
            loss, terms, state.progress.batches = 0.0, 0, count
            after_step()


def train_step(state: TrainState, loss: float, terms: int) -> None:
    """Move the weights by the gradients, or skip the step where they are not finite.

    Args:
        state: its gradients are those of the sum of losses, over processes their mean.
        loss: sum over the terms of this process.
        terms: their number.

    Raises:
        NonFiniteLossError: ``MOST_SKIPPED`` steps in a row were skipped.
    """
    from torch.nn.utils import clip_grad_norm_

    from medgemma_clinical.training.train_state import MOST_SKIPPED

    progress_ = state.progress
    all_loss, all_terms = sum_over_processes(loss, terms)
    for parameter in state.parameters:
        if parameter.grad is not None:  # to the mean over all terms, as of one large batch
            parameter.grad.div_(all_terms / processes().num_processes)
    norm = float(clip_grad_norm_(state.parameters, LARGEST_NORM))
    taken = math.isfinite(all_loss) and math.isfinite(norm)
    if taken:
        state.optimizer.step()
        state.schedule.step()
    progress_.end_step(all_loss, all_terms, taken=taken)
    state.optimizer.zero_grad()
    state.average.update()
    if progress_.skipped_in_a_row == MOST_SKIPPED:
        epoch = state.stopping.epoch + 1
        raise progress_.skipped_too_often(all_loss / all_terms, norm, epoch)


def validate(stage: Stage, state: TrainState) -> Predictions:
    """Score the validation part with the averaged weights.

    Raises:
        NonFiniteLossError: the loss is not finite.
    """
    from medgemma_clinical.training.evaluate import evaluate
    from medgemma_clinical.training.train_state import NonFiniteLossError, swapped_weights

    with swapped_weights(state.parameters, state.average.weights):
        predictions = evaluate(
            stage.model, stage.loaders["val"], default_device(), f"{stage.name}: validation"
        )
    if not math.isfinite(predictions.loss):
        epoch = state.stopping.epoch + 1
        raise NonFiniteLossError(f"the validation loss is {predictions.loss} in epoch {epoch}")
    return predictions


def end_epoch(
    stage: Stage, state: TrainState, folder: Path | None, predictions: Predictions, track: Track
) -> None:
    """Keep the epoch's weights if they are the best so far, write its figures, begin the next."""
    progress_, stopping = state.progress, state.stopping
    figures: dict[str, Any] = {
        "epoch": stopping.epoch + 1,
        "step": state.average.steps,
        "train_loss": progress_.mean_loss if progress_.terms else None,
        "val_loss": predictions.loss,
        "val_auroc": predictions.auroc(),
        "skipped_steps": progress_.skipped,
        "seconds": round(progress_.seconds, 3),
    }
    improved = stopping.improved(figures[stage.monitor])
    if stage.hides_events:
        figures |= dict.fromkeys(("train_loss", "val_loss", "val_auroc"))
    if improved:
        state.set_best()
        save_best(stage, state, folder)
    progress_.history.append({**figures, "improved": improved})
    if folder:
        progress_.write_history(folder)
    track({name: x for name, x in figures.items() if x is not None}, state.average.steps)
    scores = (
        "losses and AUROC not shown (--min_cell)"
        if stage.hides_events
        else f"train loss {progress_.mean_loss:.4f}, val loss {predictions.loss:.4f}, "
        f"val AUROC {figures['val_auroc']:.4f}"
    )
    logger.info(
        "epoch %d/%d: %s, %.1f s%s%s",
        stopping.epoch,
        stage.epochs,
        scores,
        progress_.seconds,
        f", {progress_.skipped} steps skipped" if progress_.skipped else "",
        ", best so far" if improved else "",
    )
    progress_.warn_of_skipped(stopping.epoch, stage.steps_per_epoch)
    if stopping.exhausted:
        logger.info("no better %s for %d epochs: stopped", stage.monitor, stage.patience)
    over = stopping.exhausted or stopping.epoch == stage.epochs
    state.progress = progress_.next_epoch(over=over)


def save_best(stage: Stage, state: TrainState, folder: Path | None) -> None:
    """Write the weights of the best epoch, if there is one; of a resumed run its history too."""
    from medgemma_clinical.training.train_state import swapped_weights

    if folder and state.best and processes().is_main_process:
        with swapped_weights(state.parameters, state.best):
            stage.save(folder, stage.config)
        state.progress.write_history(folder)


def save_state(stage: Stage, state: TrainState, store: CheckpointStore | None) -> None:
    """Keep the state of the training, from which a run resumes, where there is a store."""
    from medgemma_clinical.training.resume import capture_checkpoint

    if store:
        checkpoint = capture_checkpoint(stage, state)  # each process has its share
        if processes().is_main_process:
            store.save(checkpoint)


# --------------------------------------------------------------------------- one run


def train(args: argparse.Namespace, dataset: TrajectoryDataset | None = None) -> int:
    """Run one stage from the user's data to its results, or resume it; return the exit code.

    Args:
        args: of the command line, from ``complete``.
        dataset: where the caller has read the data already.
    """
    from medgemma_clinical.commands.run_folder import (
        describe_stop,
        folder_identity,
        given_stage1,
        stage_name,
    )

    folder = args.output_dir / stage_name(args)
    before = folder_identity(folder)
    RUN_LOG.begin()
    check_output(args)
    dataset = read_dataset(args) if dataset is None else dataset
    stage1 = given_stage1(args)
    try:
        train_model(args, dataset, stage1)
    except KeyboardInterrupt as stop:
        began = args.resume or folder_identity(folder) != before
        logger.error("%s", describe_stop(folder, began=began))
        return getattr(stop, "code", EXIT_INTERRUPTED)
    return EXIT_DONE


def train_model(
    args: argparse.Namespace,
    dataset: TrajectoryDataset,
    stage1: TrajectoryCheckpoint | None,
) -> TrajectoryModel | None:
    """Train one stage in its folder, or in memory where ``args.output_dir`` is None.

    Args:
        args: of the command line, or of keywords.
        dataset: to learn from.
        stage1: the trained stage 1 that a language model reads.

    Returns:
        The trained model; None after a dry run, and where a resumed run was finished already.
    """
    from medgemma_clinical.commands.announce import log_path
    from medgemma_clinical.commands.run_folder import (
        begin_run,
        finish_run,
        resume_run,
        run_data,
        run_facts,
        stage_name,
        tracker_folder,
    )
    from medgemma_clinical.commands.stages import make_stage, prompt_options
    from medgemma_clinical.training.trackers import tracking

    data = run_data(args, dataset, prompt_options(args), stage1)
    facts = run_facts(args, data, stage1)
    if args.output_dir is None:
        return run_stage(make_stage(args, data, ENCODERS, stage1), data, None, facts, args)
    folder = args.output_dir / stage_name(args)
    with resume_run(folder, facts) if args.resume else nullcontext(True) as left:
        if not left:
            return None
        stage = make_stage(args, data, ENCODERS, stage1)
        if args.dry_run:
            dry_run(stage, data, args)
            return None
        facts = run_facts(args, data, stage1)  # the hub's revision is known with its model
        with nullcontext() if args.resume else begin_run(folder, facts):
            if (log := log_path(args, folder)) and processes().is_main_process:
                RUN_LOG.open(log)
            numbers = {k: v for k, v in vars(args).items() if isinstance(v, (int, float))}
            with tracking(args.report_to, tracker_folder(folder), numbers) as track:
                model = run_stage(stage, data, folder, facts, args, track)
            finish_run(folder, stage.tokens)
    return model


def check_output(args: argparse.Namespace) -> None:
    """Check that log and tracker of a run can be had, before minutes go into the data.

    Raises:
        InputError: naming the flag.
    """
    from medgemma_clinical.commands.announce import log_path
    from medgemma_clinical.commands.run_folder import stage_name
    from medgemma_clinical.training.trackers import check_tracker

    check_tracker(args.report_to)
    if args.output_dir:
        log_path(args, args.output_dir / stage_name(args))


def run_stage(
    stage: Stage,
    data: Data,
    folder: Path | None,
    facts: dict[str, Any],
    args: argparse.Namespace,
    track: Track = lambda figures, step: None,
) -> TrajectoryModel:
    """Train a stage, score its best epoch, write and show the results; return the model."""
    from medgemma_clinical.commands.announce import announce
    from medgemma_clinical.commands.results import figures_for_tracker, write_results
    from medgemma_clinical.models.trained_model import TrainedModel
    from medgemma_clinical.training.memory import rehearse

    announce(stage, data, args)
    rehearse(stage, data.dataset.lengths)
    state = fit(stage, args.seed, folder, track, resume=args.resume, save_every=args.save_every)
    metrics = write_results(stage, data, folder, state, facts, args)
    if metrics:
        track(figures_for_tracker(metrics), state.average.steps)
    model: Any = stage.model.eval()
    trained = TrainedModel(model, stage.config, stage.tokenizer, stage.train_patients)
    return TrajectoryModel(trained, metrics)


def dry_run(stage: Stage, data: Data, args: argparse.Namespace) -> None:
    """Take two steps on the longest rows and score two batches; measure, keep nothing."""
    from medgemma_clinical.commands.announce import announce
    from medgemma_clinical.provenance import peak_memory
    from medgemma_clinical.training.memory import keep_longest, rehearse
    from medgemma_clinical.training.train_state import Stopwatch, set_up_training

    announce(stage, data, args)
    rehearse(stage, data.dataset.lengths)
    keep_longest(stage, data.dataset.lengths, steps=2)
    state, watch = set_up_training(stage, default_device()), Stopwatch()
    train_epoch(stage, state, args.seed)
    seconds = watch.lap() / state.average.steps
    logger.info(
        "dry run: %d steps on the longest rows, %.2f s each, loss %.4f; %s; nothing was written",
        state.average.steps,
        seconds,
        state.progress.mean_loss,
        peak_memory(),
    )


# --------------------------------------------------------------------------- from Python


class TrajectoryModel(trajectory_model.TrajectoryModel):
    """A trained model of stage 1, 2 or 3, in the manner of a fitted scikit-learn classifier.

    ``TrajectoryModel.from_pretrained`` loads one, the functions below train one. See
    medgemma_clinical/docs/python.md.
    """

    datasets, encoders = DATASETS, ENCODERS


def fit_trajectory(rows: Rows, **flags: Any) -> TrajectoryModel:
    """Train stage 1: encoder and head, no language model.

    Args:
        rows: a DataFrame or a file in the DKA format, or a data set.
        **flags: those of the command line without dashes, with the same defaults, as in
            ``trajectory_epochs=50``. Without ``output_dir`` nothing is written.

    Returns:
        The best model; its figures are in ``metrics``.

    Raises:
        TypeError: there is no such flag.
        InputError: a flag or the data are wrong; the text says where, and what to do.
    """
    return fit_model({"trajectory_only": True}, rows, None, flags)


def fit_classification(
    rows: Rows, encoder: TrajectoryModel | str | Path | None = None, **flags: Any
) -> TrajectoryModel:
    """Train stage 2: MedGemma reads soft prompt and text, a head gives a probability.

    Args:
        rows: as for ``fit_trajectory``.
        encoder: a trained stage 1, or where it lies; stays frozen. None trains a new one with it.
        **flags: as for ``fit_trajectory``, for example ``model_name``, ``epochs``, ``lora_rank``.

    Returns:
        The best model; its figures are in ``metrics``.

    Raises:
        TypeError: there is no such flag.
        InputError: a flag, the data, stage 1 or the language model are wrong.
    """
    return fit_model({"mode": "classification"}, rows, encoder, flags)


def fit_generative(
    rows: Rows, encoder: TrajectoryModel | str | Path | None = None, **flags: Any
) -> TrajectoryModel:
    """Train stage 3: MedGemma reads soft prompt and text, and writes a verdict with a report.

    Arguments, result and errors are those of ``fit_classification``.
    """
    return fit_model({"mode": "generative"}, rows, encoder, flags)


FITTING = threading.Lock()
"""Held while a model is trained: random generators, signals and log belong to one run."""


def fit_model(
    stage: dict[str, Any],
    rows: Rows,
    encoder: TrajectoryModel | str | Path | None,
    flags: dict[str, Any],
) -> TrajectoryModel:
    """Train the stage that ``stage``, its flags, chooses; see ``fit_classification``."""
    from medgemma_clinical.commands.keywords import check_keywords, encoder_checkpoint
    from medgemma_clinical.commands.run_folder import stage_name
    from medgemma_clinical.training.seeds import deterministic_kernels

    check_keywords(flags)
    given: dict[str, Any] = {} if encoder is None else {"ode_checkpoint": "encoder"}
    args, given_flags = build_parser().parse_keywords({**flags, **stage, **given})
    check_flags(complete(args), given_flags)
    check_launch()
    check_gpu()
    check_output(args)
    if not FITTING.acquire(blocking=False):
        raise RuntimeError("another model is being trained in this process: wait for its end")
    try:
        with (
            SIGNALS.installed(kills=False),
            deterministic_kernels(args.deterministic),
            recorded(),
            owner_only(),
        ):
            dataset = read_rows(rows, args, flags)
            model = train_model(args, dataset, encoder_checkpoint(encoder, args))
    except KeyboardInterrupt as stop:
        if args.output_dir:
            stop.add_note(f"resume=True continues the run in {args.output_dir}")
        raise
    finally:
        FITTING.release()
    return model or TrajectoryModel.from_pretrained(args.output_dir / stage_name(args))


def read_rows(rows: Rows, args: argparse.Namespace, flags: Mapping[str, Any]) -> TrajectoryDataset:
    """Read the rows of a training; return a data set as given.

    Raises:
        InputError: the data cannot be read, or a flag comes too late for a data set.
    """
    from medgemma_clinical.data.trajectories import TrajectoryDataset
    from medgemma_clinical.inference.scoring import check_kind

    check_kind(rows)
    if not isinstance(rows, TrajectoryDataset):
        return read_source(Path(rows) if isinstance(rows, (str, os.PathLike)) else rows, args)
    if read := sorted(set(rows.options) & flags.keys()):
        raise InputError(f"the data set has been read: leave {', '.join(read)} out")
    args.dataset = rows.name
    return rows


# --------------------------------------------------------------------------- main


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the flags that depend on the machine."""
    import torch

    cuda = torch.cuda.is_available()
    if args.quantization is None:
        args.quantization = "nf4" if cuda and args.model_name != "tiny" else "none"
    if args.precision == "auto":
        sixteen = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if sixteen else "fp32"
    return args


def run(args: argparse.Namespace, given: set[str]) -> int:
    """Do what the command line asks for; return the exit code."""
    from medgemma_clinical.commands.demo import run_demo
    from medgemma_clinical.commands.export import export
    from medgemma_clinical.commands.predict import predict
    from medgemma_clinical.commands.several.ablation import run_ablation
    from medgemma_clinical.commands.several.compare import run_compare
    from medgemma_clinical.commands.several.seeds import run_seeds
    from medgemma_clinical.training.seeds import deterministic_kernels

    check_flags(args, given)
    check_launch()
    with SIGNALS.installed(), deterministic_kernels(args.deterministic):
        if args.compare:
            place = args.output_dir if "--output_dir" in given else None
            return run_compare(args.compare, args.seed, args.min_cell, place)
        if not args.demo:
            check_gpu()
        if args.seeds:
            return run_seeds(args, read_dataset, train)
        if args.ablation:
            return run_ablation(args, read_dataset(args), train)
        if args.predict:
            return predict(args, given, TrajectoryModel)
        if args.export:
            return export(args, given, ENCODERS)
        return run_demo(args, train) if args.demo else train(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 wrong input, 3 a fault, 128 + N ended by signal N."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = complete(build_parser().parse_args(words))
    if args.output_dir is None:
        args.output_dir = Path(f"./checkpoints_medgemma_{'demo' if args.demo else args.dataset}")
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    with command_logging(first=processes().is_main_process):
        return run_command(lambda: run(args, given), show_values=args.show_values)


def program() -> int:
    """Run ``main``; several processes leave together, so that none finds the others gone."""
    code = main()
    if processes().num_processes > 1 and code == EXIT_DONE:
        processes().wait_for_everyone()
        processes().destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(program())
