"""``medgemma-clinical VERB``, ``python -m medgemma_clinical VERB``: one verb a task."""

from __future__ import annotations

import importlib
import os
import runpy
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from medgemma_clinical.commands.command_line import (
    EXIT_DONE,
    EXIT_INPUT,
    VERSION,
    Table,
    build_parser,
    check_needs,
    run_command,
)
from medgemma_clinical.commands.flags import check_flags
from medgemma_clinical.commands.logs import command_logging
from medgemma_clinical.files import did_you_mean, one_line
from medgemma_clinical.training.signals import SIGNALS

PROGRAM, SCRIPT, DATA_SCRIPT = "medgemma-clinical", "medgemma_trainer", "dataset_format"

VERBS = {
    "train": "fit a stage, or folds, seeds and variants of it",
    "predict": "score new rows, and evaluate the model where they have labels",
    "monitor": "judge a model after its go-live by its predictions and their outcomes",
    "pool": "pool what several sites wrote of one model by predict --aggregate",
    "compare": "compare finished stages on the test patients that they share",
    "export": "write a copy of a model to share, or with LoRA merged",
    "demo": "run all three stages on sample data with a small language model",
}
DATA_VERBS = {
    "check": "validate a DKA file and print its summary",
    "from_long": "make a DKA file from a table with one value a row",
    "from_mimic": "make one from MIMIC-IV tables",
    "from_eicu": "make one from eICU tables",
    "from_meds": "make one from events in MEDS form",
}
"""The commands of ``dataset_format.py``."""

FORMER = {f"--{verb}": verb for verb in ("predict", "monitor", "pool", "compare", "export", "demo")}
"""Flags of earlier versions that are verbs now."""

WITHOUT_MODEL = ("pool", "compare")
"""Verbs that never load torch."""

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Variables in which launchers number the processes of a run."""


def main(words: Sequence[str], table: Table | None = None) -> int:
    """Run a verb; return the exit code.

    The script gives ``table``, the flags of its training; then ``train`` need not be named.
    """
    verb, rest = (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
    if former := [k for k, word in enumerate(words) if word in FORMER]:
        k = former[0]
        typed = [FORMER[words[k]], *words[k + 1 :], *words[:k]]
        typed = ["--out" if word == "--export_dir" else word for word in typed]
        return refuse(f"{words[k]} is a command now: {PROGRAM} {one_line(shlex.join(typed))}")
    if verb in DATA_VERBS:
        return int(importlib.import_module(DATA_SCRIPT).main(words))
    if verb in ("", "train") and table is not None:
        return train(rest, table)
    if verb == "train":  # its script holds the flags, and reads them before torch is loaded
        sys.argv = [f"{PROGRAM} train", *rest]
        runpy.run_module(SCRIPT, run_name="__main__", alter_sys=True)
    if verb in VERBS:
        return run_verb(verb, rest)
    return without_verb(verb, rest)


def refuse(problem: str) -> int:
    """Say what is wrong with a command line, and return the exit code."""
    sys.stderr.write(f"error: {problem}\n")
    return EXIT_INPUT


def without_verb(verb: str, words: Sequence[str]) -> int:
    """Show the verbs, or refuse what is none."""
    if verb or not words:
        near = did_you_mean(verb, VERBS | DATA_VERBS) or f": {PROGRAM} --help lists the commands"
        return refuse(f"unrecognised {one_line(verb)}{near}" if verb else f"no command{near}")
    if words[0] == "--version":
        sys.stdout.write(f"{VERSION}\n")
        return EXIT_DONE
    if words[0] not in ("-h", "--help"):
        return refuse(f"no command: {PROGRAM} train {one_line(words[0])} ... trains")
    lines = [f"  {name:<11} {about}" for name, about in (VERBS | DATA_VERBS).items()]
    about = f"usage: {PROGRAM} COMMAND ...\n\ncommands, each with a --help of its own:\n"
    sys.stdout.write(about + "\n".join(lines) + "\n")
    return EXIT_DONE


def is_first() -> bool:
    """Return whether this is the first process of a run."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def train(words: Sequence[str], table: Table) -> int:
    """Run the trainer; its flags are checked before torch is loaded."""
    args, given = build_parser(f"{SCRIPT}.py", VERBS["train"], table).parse_given(words)

    def action() -> int:
        check_flags(args, given, table)
        return int(importlib.import_module(SCRIPT).run(args))

    with command_logging(first=is_first()):
        return run_command(action, show_values=args.show_values)


def run_verb(verb: str, words: Sequence[str]) -> int:
    """Run a command on a trained model, or on files alone."""
    command: Any = importlib.import_module(f"medgemma_clinical.commands.{verb}")
    parser = build_parser(f"{PROGRAM} {verb}", VERBS[verb], command.FLAGS)
    args, given = parser.parse_given(words)

    def action() -> int:
        check_needs(command.FLAGS, given)
        with SIGNALS.installed():
            if verb in WITHOUT_MODEL:
                return int(command.run(args))
            return int(command.run(args, importlib.import_module(SCRIPT)))

    with command_logging(first=is_first()):
        return run_command(action, show_values=getattr(args, "show_values", False))


def program(table: Table | None = None) -> int:
    """Run the command line of this process; several processes leave together."""
    if sys.argv[1:2] and sys.argv[1] in DATA_VERBS:
        importlib.import_module(DATA_SCRIPT).end_on_signals()
    code = main(sys.argv[1:], table)
    if not code and (distributed := sys.modules.get("medgemma_clinical.distributed")):
        distributed.leave_together()  # so that none finds the others gone
    return code


if __name__ == "__main__":
    sys.exit(program())
