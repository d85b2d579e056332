"""The trainer's flags: which go together, and what of them the data take."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from medgemma_clinical.commands.command_line import Table, changed, check_needs, rows_of
from medgemma_clinical.files import InputError

WAYS = {
    **{name: f"--{name}" for name in ("dry_run", "leave_out", "folds", "ablation")},
    "stage1": "--trajectory_only",
}
"""Ways of training, each with the flag that chooses it. Beside these, ``Flag.unread`` names llm,
stages 2 and 3, and text, stages 2 and 3 without stage 1."""


def check_flags(args: Namespace, given: set[str], table: Table) -> None:
    """Refuse flags that do not fit each other; ``given`` are those that the user typed."""
    typed = [flag for flag in rows_of(table) if f"--{flag.name}" in given]
    has_stage1 = args.ode_checkpoint is not None
    ways = {way: flag for way, flag in WAYS.items() if flag in given}
    if args.soft_prompt == "off" and not has_stage1:
        ways["text"] = "--soft_prompt off without --ode_checkpoint"
    for way, chosen in ways.items():
        if unread := [f"--{flag.name}" for flag in typed if way in flag.unread.split()]:
            raise InputError(f"{chosen} has no use for {', '.join(unread)}: leave it out")
    check_needs(table, given)
    if args.encoder and (unread := sorted(given & {"--solver", "--dynamics"})):
        raise InputError(f"--encoder has no use for {', '.join(unread)}: leave it out")
    if args.ablation is not None and args.series_text == "none":
        raise InputError("--ablation: --series_text none leaves no text to compare with")
    if args.soft_prompt == "off" and has_stage1 and args.stage1_logit == "off":
        raise InputError("--soft_prompt off --stage1_logit off: leave --ode_checkpoint out")
    if not has_stage1 and (args.soft_prompt == "shuffled" or args.stage1_logit == "off"):
        raise InputError("--soft_prompt shuffled, --stage1_logit off: need --ode_checkpoint")


def dataset_options(
    values: Mapping[str, Any], table: Table, kinds: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the flags that the chosen kind of data takes as keywords; refuse those of others."""
    kind = kinds[values["dataset"]]
    every = {o for each in kinds.values() for o in (*each.options, each.source_flag)}
    if wrong := sorted(changed(values, table, every - {*kind.options, kind.source_flag})):
        name = "leave_out" if wrong[0] == "site" and values["leave_out"] else wrong[0]
        raise InputError(f"--{name}: not for --dataset {values['dataset']}: leave it out")
    given = {option: values[option] for option in kind.options}
    return {name: value for name, value in given.items() if value is not None}
