"""The trainer's flags: which go together, what they stand for on this machine."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import huggingface_hub.constants
import torch

from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.files import InputError
from medgemma_clinical.models.language_model import INT8_REFUSED, TINY

logger = logging.getLogger(__name__)

WAYS = (
    *("--predict", "--export", "--compare", "--demo", "--dry_run"),
    *("--ablation", "--seeds", "--resume"),
)
"""Flags that say what to do; the last three go together, the others alone."""

ALLOWED_FLAGS: dict[str, set[str]] = {
    "--compare": {"--seed", "--min_cell", "--output_dir"},
    "--demo": {"--output_dir", "--seed", "--log_file", "--open"},
    "--export": {"--checkpoint", "--export_dir", "--model_name", "--show_values"},
    "--predict": {
        *("--checkpoint", "--predictions", "--strict", "--data_path", "--data_dir", "--dataset"),
        *("--organ", "--model_name", "--quantization", "--precision", "--batch_size", "--seed"),
        *("--show_values", "--min_cell", "--attention", "--explain", "--patients"),
    },
}
"""All that these ways read."""

NEEDED_FLAGS: dict[str, dict[str, set[str]]] = {
    "--predict": {
        "--checkpoint RUN/STAGE": {"--checkpoint"},
        "--predictions FILE.csv": {"--predictions"},
        "--data_path FILE or --data_dir FOLDER": {"--data_path", "--data_dir"},
    },
    "--export": {"--checkpoint RUN/STAGE": {"--checkpoint"}, "--export_dir DIR": {"--export_dir"}},
}
"""What these ways cannot do without, and one flag of each that must be given."""

VARIED_FLAGS = {
    *("--trajectory_only", "--mode", "--ode_checkpoint", "--soft_prompt", "--freeze_ode"),
    *("--dynamics", "--facts", "--stage1_logit", "--base_weights"),
}
"""Flags that the arms of ``--ablation`` set."""

MEMORY_SETTING = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
"""On a GPU: batches of many lengths leave no fragments. Read when CUDA starts."""

STAGE_1_FLAGS = ("time_scale", "solver", "dynamics", "members", "facts", "prediction_time")
"""Flags that the file of a trained stage 1 decides."""

LANGUAGE_MODEL_FLAGS = (
    *("base_weights", "quantization", "precision", "lora_rank", "lora_alpha", "max_text_tokens"),
)
"""Flags that a checkpoint of stages 2 and 3 holds as they are."""


def set_environment() -> None:
    """Set what libraries read: memory on a GPU, and that the hub learns nothing of the user."""
    os.environ.setdefault(*MEMORY_SETTING)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the flags that depend on the machine.

    Raises:
        InputError: weights that cannot be quantised.
    """
    cuda = torch.cuda.is_available()
    whole = args.model_name == TINY or args.base_weights == "random"  # cannot be packed
    if whole and args.quantization == "nf4":
        raise InputError("--quantization nf4: not for the tiny model and random weights: use none")
    if args.quantization is None:
        args.quantization = "nf4" if cuda and not whole else "none"
    if args.precision == "auto":
        sixteen = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if sixteen else "fp32"
    return args


def changed(
    args: argparse.Namespace, parser: argparse.ArgumentParser, names: Iterable[str]
) -> dict[str, Any]:
    """Return those flags that do not have their default, with their values."""
    values = {name: getattr(args, name) for name in names}
    return {name: x for name, x in values.items() if x != parser.get_default(name)}


def dataset_options(
    args: argparse.Namespace,
    kinds: Mapping[str, type[TrajectoryDataset]],
    parser: argparse.ArgumentParser,
) -> dict[str, Any]:
    """Return the flags that the chosen kind of data takes as keywords.

    Raises:
        InputError: a flag of another kind of data.
    """
    kind = kinds[args.dataset]
    others = {o for each in kinds.values() for o in (*each.options, each.source_flag)}
    if wrong := sorted(changed(args, parser, others - {*kind.options, kind.source_flag})):
        raise InputError(f"--{wrong[0]}: not for --dataset {args.dataset}: leave it out")
    given = {option: getattr(args, option) for option in kind.options}
    return {name: value for name, value in given.items() if value is not None}


def check_quantization(text: str) -> str:
    """Refuse 8-bit weights with the reason; used as an argparse type."""
    if text == "int8":
        raise argparse.ArgumentTypeError(INT8_REFUSED)
    return text


def check_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Check that the flags fit each other.

    Args:
        args: of the command line.
        given: the flags that the user typed.

    Raises:
        InputError: naming those that do not.
    """
    chosen = [flag for flag in WAYS if flag in given]
    if len(chosen) > 1 and not set(WAYS[-3:]).issuperset(chosen):
        raise InputError(f"{' and '.join(chosen)} do not go together")
    for way, needed in NEEDED_FLAGS.items():
        if way in given:
            _check_needed(way, needed, given)
    for way, allowed in ALLOWED_FLAGS.items():
        if way in given:
            _check_unused(way, given - allowed - {way})
    if not args.predict:
        unread = {"--predictions", "--strict", "--explain"}
        _check_unused("a command without --predict", given & unread)
    if not args.explain:
        _check_unused("a command without --explain", given & {"--patients"})
    if not args.demo:
        _check_unused("a command without --demo", given & {"--open"})
    if not args.export:
        _check_unused("a command without --export", given & {"--export_dir"})
    if not (args.predict or args.export):
        _check_unused("a command without --predict or --export", given & {"--checkpoint"})
    if args.ablation:
        _check_unused("--ablation", given & VARIED_FLAGS)
        if args.series_text == "none":
            raise InputError("--ablation: --series_text none leaves no text to compare with")
    else:
        _check_unused("a command without --ablation", given & {"--arms", "--reference"})
    off, shuffled = args.soft_prompt == "off", args.soft_prompt == "shuffled"
    if args.trajectory_only:
        _check_unused("--trajectory_only", given & {"--ode_checkpoint"})
        unread = {"--soft_prompt", "--stage1_logit", "--base_weights"}
        _check_unused("--trajectory_only", given & unread)
        if "--epochs" in given:
            logger.warning("--epochs is for stages 2 and 3: stage 1 takes --trajectory_epochs")
    elif off and args.ode_checkpoint is None:
        stage1 = {"--freeze_ode", "--dynamics", "--members", "--facts", "--prediction_time"}
        unread = stage1 | {"--stage1_logit"}
        _check_unused("--soft_prompt off without --ode_checkpoint", given & unread)
    elif off and args.stage1_logit == "off":
        raise InputError("--soft_prompt off --stage1_logit off: leave --ode_checkpoint out")
    elif (shuffled or args.stage1_logit == "off") and args.ode_checkpoint is None:
        flag = "--soft_prompt shuffled" if shuffled else "--stage1_logit off"
        raise InputError(f"{flag}: give a trained stage 1 by --ode_checkpoint")


def _check_needed(way: str, needed: dict[str, set[str]], given: set[str]) -> None:
    """Check that a way has all its flags; name those in its way in the same line."""
    missing = [flag for flag, names_ in needed.items() if not names_ & given]
    unused = sorted(given - ALLOWED_FLAGS[way] - {way})
    if missing:
        without = f"; it has no use for {', '.join(unused)}: leave it out" if unused else ""
        raise InputError(f"{way} needs {', '.join(missing)}{without}")


def _check_unused(way: str, unused: set[str]) -> None:
    if unused:
        raise InputError(f"{way} has no use for {', '.join(sorted(unused))}: leave it out")
