"""The trainer's flags: which go together, what they stand for on this machine."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.files import InputError
from medgemma_clinical.models.language_model import BUILT_IN, INT8_REFUSED

logger = logging.getLogger(__name__)

STAGE_1_FLAGS = (
    *("time_scale", "solver", "dynamics", "members", "dropout", "facts", "prediction_time"),
)
"""Flags that the file of a trained stage 1 decides."""

ALONE = ("--predict", "--export", "--compare", "--demo", "--dry_run")
TOGETHER = ("--ablation", "--seeds", "--folds", "--leave_out", "--resume")
"""Flags that say what to do."""

ALLOWED_FLAGS = {
    "--compare": "--seed --output_dir --primary",
    "--demo": "--output_dir --seed --log_file --open",
    "--export": "--checkpoint --export_dir --model_name --show_values",
    "--predict": "--checkpoint --predictions --use --primary --update --strict --explain "
    "--patients --data_path --data_dir --dataset --organ --site --model_name --quantization "
    "--precision --attention --batch_size --seed --min_cell --show_values",
}
"""All that these ways read."""

NEEDED_FLAGS = {
    "--predict": "--checkpoint, --predictions, --data_path or --data_dir",
    "--export": "--checkpoint, --export_dir",
    **dict.fromkeys(("--predictions", "--use", "--update", "--strict", "--explain"), "--predict"),
    **dict.fromkeys(("--arms", "--reference"), "--ablation"),
    "--final": "--folds or --leave_out",
    "--patients": "--explain",
    "--open": "--demo",
    "--export_dir": "--export",
    "--checkpoint": "--predict or --export",
}
"""What flags cannot do without."""

TEXT_ONLY = "--soft_prompt off without --ode_checkpoint"

UNREAD_FLAGS = {
    # those of the language model and its text
    "--trajectory_only": "--mode --epochs --ode_checkpoint --model_name --quantization --precision "
    "--attention --base_weights --soft_prompt --stage1_logit --num_prefix_tokens --projection_lr "
    "--adapter_lr --head_lr --lora_rank --lora_alpha --lora_dropout --series_text --text_context "
    "--max_text_tokens --gradient_accumulation --gradient_checkpointing",
    # those that its variants set
    "--ablation": "--trajectory_only --mode --ode_checkpoint --soft_prompt --freeze_ode --dynamics "
    "--facts --stage1_logit --base_weights",
    # those of other ways to train several models
    "--folds": "--seeds --ablation --arms --reference",
    "--leave_out": "--folds --seeds --ablation --arms --reference",
    # those of stage 1
    TEXT_ONLY: "--freeze_ode --encoder_lr --stage1_logit --time_scale --solver --dynamics "
    "--members --dropout --facts --prediction_time",
}
"""Flags that these ways of training do not read."""


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the flags that depend on the machine."""
    cuda = torch.cuda.is_available()
    whole = args.model_name in BUILT_IN or args.base_weights == "random"  # cannot be packed
    if whole and args.quantization == "nf4":
        raise InputError("--quantization nf4: not for built-in models and random weights: use none")
    if args.quantization is None:
        args.quantization = "nf4" if cuda and not whole else "none"
    if args.precision == "auto":
        sixteen = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if sixteen else "fp32"
    return args


def changed(
    args: argparse.Namespace, defaults: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Any]:
    """Return those flags that do not have their default, with their values."""
    values = {name: getattr(args, name) for name in names}
    return {name: x for name, x in values.items() if x != defaults[name]}


def dataset_options(
    args: argparse.Namespace,
    kinds: Mapping[str, type[TrajectoryDataset]],
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the flags that the chosen kind of data takes as keywords; refuse those of others."""
    kind = kinds[args.dataset]
    others = {o for each in kinds.values() for o in (*each.options, each.source_flag)}
    if wrong := sorted(changed(args, defaults, others - {*kind.options, kind.source_flag})):
        name = "leave_out" if wrong[0] == "site" and args.leave_out else wrong[0]
        raise InputError(f"--{name}: not for --dataset {args.dataset}: leave it out")
    given = {option: getattr(args, option) for option in kind.options}
    return {name: value for name, value in given.items() if value is not None}


def check_quantization(text: str) -> str:
    """Refuse 8-bit weights with the reason; used as an argparse type."""
    if text == "int8":
        raise argparse.ArgumentTypeError(INT8_REFUSED)
    return text


def check_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags that do not fit each other; ``given`` are those that the user typed."""
    ways = [flag for flag in (*ALONE, *TOGETHER) if flag in given]
    if len(ways) > 1 and ways[0] in ALONE:
        raise InputError(f"{' and '.join(ways)} do not go together")
    for flag, needed in NEEDED_FLAGS.items():
        for each in needed.split(", ") if flag in given else ():
            if not given.intersection(each.split(" or ")):
                raise InputError(f"{flag} needs {each}")
    off, given_stage1 = args.soft_prompt == "off", args.ode_checkpoint is not None
    unread = {way: given - {way, *flags.split()} for way, flags in ALLOWED_FLAGS.items()}
    unread |= {way: given.intersection(flags.split()) for way, flags in UNREAD_FLAGS.items()}
    for way in (*sorted(given), *([TEXT_ONLY] if off and not given_stage1 else [])):
        if flags := ", ".join(sorted(unread.get(way, ()))):
            raise InputError(f"{way} has no use for {flags}: leave it out")
    if args.ablation and args.series_text == "none":
        raise InputError("--ablation: --series_text none leaves no text to compare with")
    if off and given_stage1 and args.stage1_logit == "off":
        raise InputError("--soft_prompt off --stage1_logit off: leave --ode_checkpoint out")
    if not given_stage1 and (args.soft_prompt == "shuffled" or args.stage1_logit == "off"):
        raise InputError("--soft_prompt shuffled, --stage1_logit off: need --ode_checkpoint")
