"""The command line's own words: parsers, number types, exit codes for errors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import logging
import math
import os
import re
import socket
import ssl
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from medgemma_clinical.commands.logs import plain
from medgemma_clinical.data.database.flags import TableRequest
from medgemma_clinical.files import InputError, RunFault, one_line, owner_only
from medgemma_clinical.models.checkpoint_schema import INT8_REFUSED, LARGEST_COUNT

logger = logging.getLogger(__name__)

EXIT_DONE, EXIT_INPUT, EXIT_FAULT, EXIT_INTERRUPTED = 0, 2, 3, 130

SHOW_VALUES = "an error about a cell shows what the cell holds"
"""Help of the flag ``--show_values``."""

MIN_CELL = "counts of fewer patients are hidden (0 = none)"
"""Help of the flag ``--min_cell``."""

LESS_MEMORY = (
    "lower --batch_size and raise --gradient_accumulation as much, add --gradient_checkpointing, "
    "or shorten the text by --series_text or --max_text_tokens"
)
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


NETWORK_ERRORS = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)

NO_USAGE_DATA = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""Settings by which the libraries send nothing about the user to their makers."""

for _name, _value in NO_USAGE_DATA.items():  # read when those libraries are imported
    os.environ.setdefault(_name, _value)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; keywords of Python are parsed as flags."""

    def error(self, message: str) -> NoReturn:
        """Refuse wrong usage.

        Raises:
            InputError: always.
        """
        raise InputError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; exit with code 2 where its usage is wrong."""
        try:
            return super().parse_args(args, namespace)
        except InputError as error:
            self.exit(EXIT_INPUT, f"error: {error} (see --help)\n")

    def parse_keywords(self, keywords: Mapping[str, Any]) -> tuple[argparse.Namespace, set[str]]:
        """Parse keywords, whose names are those of the flags; None leaves a flag out.

        Returns:
            All flags with their values, and the flags that were given.

        Raises:
            TypeError: there is no such flag.
            InputError: a value is wrong.
        """
        known = vars(super().parse_args([]))
        words = []
        for name, value in keywords.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f": did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"unexpected keyword {name!r}{hint}")
            bare = known[name] is False  # a flag that takes no value
            if value is None or (bare and value is False):
                continue
            words.append(f"--{name}" if bare and value is True else f"--{name}={_text(value)}")
        given = {word.partition("=")[0] for word in words}
        return super().parse_args(words), given


def _text(value: Any) -> str:
    """Return a Python value as a flag's text: a list by commas, true and false as on and off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def number(
    kind: type, low: float, high: float = sys.float_info.max, *, open_low: bool = False
) -> Callable[[str], Any]:
    """Return an argparse type for finite numbers from ``low`` to ``high``."""

    noun = "a whole number" if kind is int else "a number"
    limit = "" if high == sys.float_info.max else f" to {high:g}"

    def convert(text: str) -> Any:
        """Convert one value of the flag."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (open_low and value == low):
            start = f"{'above' if open_low else 'from'} {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be {noun} {start}{limit}")
        return value

    return convert


POSITIVE, WHOLE = number(int, 1, LARGEST_COUNT), number(int, 0, LARGEST_COUNT)
RATE = number(float, 0, 1, open_low=True)


def names(text: str) -> list[str]:
    """Split a comma-separated list of names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def check_quantization(text: str) -> str:
    """Refuse 8-bit weights with the reason; used as an argparse type."""
    if text == "int8":
        raise argparse.ArgumentTypeError(INT8_REFUSED)
    return text


METAVARS = {Path: "PATH", float: "NUMBER", int: "NUMBER"}
"""Values of flags in ``--help``, by type; others have the name of their flag."""


def add_flags(parser: argparse.ArgumentParser, request: type[TableRequest]) -> None:
    """Add the fields of a request as flags."""
    types = get_type_hints(request)
    for field in dataclasses.fields(request):
        about = field.metadata
        default = None if field.default is dataclasses.MISSING else field.default
        shown = ",".join(default) if isinstance(default, tuple) else default
        by_default = "" if shown in (None, "") or shown is False else f" (default: {shown})"
        words: dict[str, Any] = {"help": about["help"] + by_default, "default": default}
        words["required"] = field.default is dataclasses.MISSING
        if types[field.name] is bool:
            parser.add_argument(f"--{field.name}", **{**words, "action": "store_true"})
            continue
        if about["separated"]:
            words["type"] = lambda text: tuple(names(text))
        elif about["repeated"]:
            words["action"] = Repeated
        else:
            kind = types[field.name]
            words |= {"type": kind, "metavar": METAVARS.get(kind)}
        if about["choices"]:
            words["metavar"] = f"{{{','.join(about['choices'])}}}"
        if about["alone"] is not None:
            words |= {"nargs": "?", "const": about["alone"]}
        parser.add_argument(f"--{field.name}", **words)


class Repeated(argparse.Action):
    """Collect the values of a flag that may be given several times, as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Add a value."""
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), values))


def run_command(action: Callable[[], int], *, show_values: bool = False) -> int:
    """Run one command; every error becomes one line and an exit code.

    Args:
        action: returns the exit code of a command that succeeds.
        show_values: show the content of a cell that an error is about, and tracebacks of faults.

    Returns:
        0 done; 2 wrong input; 3 a fault; 129, 130 or 143 ended by a signal.
    """
    try:
        with owner_only():
            return action()
    except InputError as error:
        logger.error("%s", error.message(show_value=show_values))
        return EXIT_INPUT
    except KeyboardInterrupt as stop:
        logger.error("interrupted: nothing more was written")
        return getattr(stop, "code", EXIT_INTERRUPTED)
    except Exception as error:
        logger.error("%s", describe_fault(error))
        if show_values:
            sys.stderr.write(plain(traceback.format_exc()))
        return EXIT_FAULT


def describe_fault(error: Exception) -> str:
    """Return one line on an error that the user's input did not cause.

    The text of an exception may hold a patient's cell: only its type and place are shown.
    """
    if isinstance(error, RunFault):
        return str(error)
    text = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return "the machine has too little memory: read fewer rows or series, or free some"
    if re.search("(out of|allocate|enough) memory", text):
        return f"the GPU or the machine has too little memory: {LESS_MEMORY}"
    if isinstance(error, NETWORK_ERRORS) or (isinstance(error, OSError) and error.errno):
        return _describe_os_error(error)
    if re.search("gloo|NCCL|[Cc]onnection", text) and "WORLD_SIZE" in os.environ:
        return "another process of this run has ended: go on by --resume"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
    if type(error).__name__ == "AcceleratorError" or re.search("CUDA|CUBLAS|NVIDIA", text):
        return (
            f"the GPU or its driver fails ({what}): see what nvidia-smi says; --show_values shows "
            "the text of the error"
        )
    return f"a fault of the program, {what}: please report it"


def _describe_os_error(error: OSError) -> str:
    """Describe an error of the disk or of the network by its kind and file."""
    if isinstance(error, NETWORK_ERRORS) or error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        kind = type(error).__name__
        return f"the network or a server fails ({kind}): try again, or work offline"
    place = one_line(str(error.filename or type(error).__name__))
    problem = os.strerror(error.errno or 0)
    return f"{place}: {problem}: make room, get the right to it, or choose another place"


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
    off = args.soft_prompt == "off"
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
    elif args.stage1_logit == "off":
        if off:
            raise InputError("--soft_prompt off --stage1_logit off: leave --ode_checkpoint out")
        if args.ode_checkpoint is None:
            raise InputError("--stage1_logit off: give a trained stage 1 by --ode_checkpoint")


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
