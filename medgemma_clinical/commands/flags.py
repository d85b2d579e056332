"""The trainer's flags: their tags, which go together, what they stand for on this machine."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.decision import GOALS, DecisionOptions, parse_threshold
from medgemma_clinical.files import InputError
from medgemma_clinical.models import encoders
from medgemma_clinical.models.language_model import DEMO, INT8_REFUSED

logger = logging.getLogger(__name__)

WAYS = {
    name: f"--{name}"
    for name in ("predict", "export", "monitor", "compare", "pool", "demo", "dry_run")
}
WAYS |= {name: f"--{name}" for name in ("leave_out", "folds", "ablation")}
WAYS |= {"stage1": "--trajectory_only"}
"""Ways of use, each with the flag that chooses it; as a tag, a way reads the flag."""

TRAINING = "stage1 llm text ablation leave_out folds dry_run"
"""Tags of a flag that every training reads."""

TAGS = {
    **{way: f"``{flag}`` reads it" for way, flag in WAYS.items()},
    "llm": "stages 2 and 3 read it",
    "text": "stages 2 and 3 without stage 1 read it",
    "free": "it may change at ``--resume``: files are known by content, batches by their product",
    "keyword": "the functions of Python that train a stage which reads it take it",
    "cross_validate": "this function of Python takes it",
    "folder": "from Python it needs ``output_dir``",
    "stage1_file": "the file of a trained stage 1 decides it",
    "default": "``--predict`` takes its default, not the checkpoint's value",
}
"""What a tag says of its flag; without tags a flag is refused, and fixed at ``--resume``."""


class Flag(NamedTuple):
    """A flag of the trainer, as ``build_parser`` declares it."""

    default: Any
    tags: frozenset[str]
    needs: str  # "--a, --b or --c": what cannot be left out beside it


Add = Callable[..., None]
FLAGS: dict[str, Flag] = {}
"""The flags of the trainer by their names, in the order of ``--help``."""


def adders(group: Any, tags: str) -> tuple[Add, Add]:
    """Return functions that add a flag or a switch with these tags; a minus removes a tag."""

    def add(name: str, text: str, own_tags: str = "", *, needs: str = "", **options: Any) -> None:
        words = {*tags.split(), *own_tags.split()}
        removed = {word for word in words if word.startswith("-")}
        kept = frozenset(word for word in words - removed if f"-{word}" not in removed)
        assert kept <= TAGS.keys(), name
        action = group.add_argument(name, help=text, **options)
        FLAGS[action.dest] = Flag(action.default, kept, needs)

    return add, partial(add, action="store_true")


def tagged(tag: str) -> list[str]:
    """Return the names of the flags that have a tag."""
    return [name for name, flag in FLAGS.items() if tag in flag.tags]


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the flags that depend on the machine."""
    cuda = torch.cuda.is_available()
    whole = args.model_name == DEMO or args.base_weights == "random"  # cannot be packed
    if whole and args.quantization == "nf4":
        raise InputError(f"--quantization nf4: not for {DEMO} and random weights: use none")
    if args.quantization is None:
        args.quantization = "nf4" if cuda and not whole else "none"
    if args.precision == "auto":
        sixteen = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if sixteen else "fp32"
    return args


def changed(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return those flags that do not have their default, with their values."""
    values = {name: getattr(args, name) for name in names}
    return {name: x for name, x in values.items() if x != FLAGS[name].default}


def dataset_options(
    args: argparse.Namespace, kinds: Mapping[str, type[TrajectoryDataset]]
) -> dict[str, Any]:
    """Return the flags that the chosen kind of data takes as keywords; refuse those of others."""
    kind = kinds[args.dataset]
    all_options = {
        o for data_class in kinds.values() for o in (*data_class.options, data_class.source_flag)
    }
    if wrong := sorted(changed(args, all_options - {*kind.options, kind.source_flag})):
        name = "leave_out" if wrong[0] == "site" and args.leave_out else wrong[0]
        raise InputError(f"--{name}: not for --dataset {args.dataset}: leave it out")
    given = {option: getattr(args, option) for option in kind.options}
    return {name: value for name, value in given.items() if value is not None}


TIMES_REFUSE = (*("ablation", "calibrate", "monitor_rule"),)
"""Flags that wait for labels."""


def check_outcome(args: argparse.Namespace, dataset: TrajectoryDataset) -> None:
    """Refuse what is not there for times to events."""
    if dataset.outcome_kind == "label":
        return
    if args.mode == "generative" and not args.trajectory_only:
        raise InputError("--mode generative: not for times to events: use --mode classification")
    if unread := changed(args, TIMES_REFUSE):
        raise InputError(f"--{next(iter(unread))}: not for times to events: leave it out")


def check_threshold(text: str) -> str:
    """Refuse what is no threshold; used as an argparse type."""
    with contextlib.suppress(ValueError):
        parse_threshold(text)
        return text
    goals = ", ".join(f"'{goal} 0.9'" for goal in GOALS)
    raise argparse.ArgumentTypeError(
        f"{text!r}: give a risk within 0 and 1, such as 0.1, or {goals}"
    )


def decision_options(args: argparse.Namespace, *, out_of_fold: bool = False) -> DecisionOptions:
    """Return what the flags say of a decision rule; ``out_of_fold``: of all folds together."""
    auto = "tests" if out_of_fold else "none"
    return DecisionOptions(auto if args.calibrate == "auto" else args.calibrate, args.threshold)


def parse_encoder(text: str) -> str:
    """Import the user's own encoder and return its name; used as an argparse type."""
    try:
        return encoders.register(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_quantization(text: str) -> str:
    """Refuse 8-bit weights with the reason; used as an argparse type."""
    if text == "int8":
        raise argparse.ArgumentTypeError(INT8_REFUSED)
    return text


def check_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags that do not fit each other; ``given`` are those that the user typed."""
    typed = {name: FLAGS[name] for name in FLAGS if f"--{name}" in given}
    has_stage1 = args.ode_checkpoint is not None
    ways = {way: flag for way, flag in WAYS.items() if flag in given}
    if args.soft_prompt == "off" and not has_stage1:
        ways["text"] = "--soft_prompt off without --ode_checkpoint"
    for name, flag in typed.items():  # first those of ways that are not chosen
        if not (flag.needs or flag.tags & {"stage1", "llm", *ways}):
            needed = " or ".join(WAYS[way] for way in WAYS if way in flag.tags)
            raise InputError(f"--{name} needs {needed}")
    for way, chosen in ways.items():
        if unread := [f"--{name}" for name, flag in typed.items() if way not in flag.tags]:
            raise InputError(f"{chosen} has no use for {', '.join(unread)}: leave it out")
    for name, flag in typed.items():
        for needed in flag.needs.split(", ") if flag.needs else ():
            if not given.intersection(needed.split(" or ")):
                raise InputError(f"--{name} needs {needed}")
    if args.encoder and (unread := sorted(given & {"--solver", "--dynamics"})):
        raise InputError(f"--encoder has no use for {', '.join(unread)}: leave it out")
    if args.ablation and args.series_text == "none":
        raise InputError("--ablation: --series_text none leaves no text to compare with")
    if args.soft_prompt == "off" and has_stage1 and args.stage1_logit == "off":
        raise InputError("--soft_prompt off --stage1_logit off: leave --ode_checkpoint out")
    if not has_stage1 and (args.soft_prompt == "shuffled" or args.stage1_logit == "off"):
        raise InputError("--soft_prompt shuffled, --stage1_logit off: need --ode_checkpoint")
