"""The first session on a GPU: does everything work on CUDA, how fast, how large?

    python tests/benchmarks/gpu.py
    python tests/benchmarks/gpu.py --only stage2 --only speed2       # and what these steps need
    python tests/benchmarks/gpu.py --toy            # two narrow layers, also without a GPU
    python tests/benchmarks/gpu.py --toy --model_type qwen3          # of another type of model

Needs no network, no weights and no pytest: random weights in the shape of MedGemma-4B are written
to a temporary folder (8 GB, TMPDIR says where). Each step runs in a process of its own, so that a
fault of the card, an exhausted memory or a hanging step leaves the others alone. A line is printed
as each step ends, a table of all at the end. A "finding" in it deserves attention without being a
failure. Exit code 1 if a step failed.

It takes about ten minutes on an A100 or H100 (estimated).
"""

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest import SkipTest

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from common import write

import medgemma_trainer  # noqa: F401  (once, not in each step)
from medgemma_clinical.distributed import exact_kernels

FORK = multiprocessing.get_context("fork")
"""This process must not touch the card: its children could not use it. bitsandbytes, and peft with
it, touch it when they are imported, so the modules of the steps are imported in the children."""

MODULES = ("gpu_steps", "gpu_kernels")
TIMEOUT = 600.0
"""Seconds after which a step counts as hanging."""


class Step(NamedTuple):
    """A function, its arguments after the plan, and the earlier steps whose files it reads.

    It returns its figures, each a text, or raises.
    """

    function: str
    arguments: tuple = ()
    needs: tuple = ("models",)


STEPS = {
    "machine": Step("gpu_steps.describe_machine", needs=()),
    "models": Step("gpu_steps.write_models", needs=()),
    "attention": Step("gpu_kernels.compare_attention", needs=()),
    "products": Step("gpu_kernels.compare_products"),
    "stage1": Step("gpu_steps.train_stage1"),
    "stage2": Step("gpu_steps.train_llm", ("classification",), ("models", "stage1")),
    "predict": Step("gpu_steps.predict", needs=("models", "stage1", "stage2")),
    "stage3": Step("gpu_steps.train_llm", ("generative",), ("models", "stage1")),
    "speed2": Step("gpu_kernels.measure_llm", ("classification",)),
    "speed3": Step("gpu_kernels.measure_llm", ("generative",)),
    "reports": Step("gpu_kernels.measure_reports"),
    "small_card": Step("gpu_steps.train_on_small_card", needs=("models", "stage1")),
    "compiled": Step("gpu_kernels.measure_compiled"),
    "left_padding": Step("gpu_steps.compare_reports"),
    "resume2": Step("gpu_steps.resume", ("classification",)),
    "resume3": Step("gpu_steps.resume", ("generative",)),
    "speed1": Step("gpu_kernels.measure_stage1", needs=()),
    "processes": Step("gpu_steps.compare_processes"),
}
"""The most important first."""


class Plan(NamedTuple):
    """What the steps share: a folder and the flags."""

    folder: Path
    toy: bool
    model_type: str
    batch_size: int


def with_needs(names):
    """Return the names of the machine's step, of these and of what they need, in their order."""
    wanted = {"machine", *names}
    for name in names:
        wanted.update(STEPS[name].needs)
    return [name for name in STEPS if name in wanted]


def attempt(step, plan, sender):
    """Run a step; send its state, its figures or why there are none, and a failure's traceback."""
    output = io.StringIO()
    module, _, function = step.function.partition(".")
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            work = getattr(importlib.import_module(module), function)
            with exact_kernels():
                figures = work(plan, *step.arguments)
        sender.send(("passed", "; ".join(figures), ""))
    except SkipTest as reason:
        sender.send(("skipped", str(reason), ""))
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        printed = "\n".join(output.getvalue().splitlines()[-40:])
        sender.send(("failed", reason, f"{printed}\n{traceback.format_exc()}"))


def run_apart(step, plan):
    """Run a step in a process of its own; return what ``attempt`` sends."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=attempt, args=(step, plan, sender))
    child.start()
    sender.close()
    try:
        known = receiver.poll(TIMEOUT)
        outcome = receiver.recv() if known else ("failed", f"hangs: {TIMEOUT:.0f} s", "")
    except EOFError:
        child.join()
        outcome = ("failed", f"the process ended with {child.exitcode}", "")
    child.kill()
    child.join()
    return outcome


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    help_only = f"a step, repeatable: {', '.join(STEPS)}"
    parser.add_argument("--only", action="append", choices=STEPS, metavar="STEP", help=help_only)
    parser.add_argument("--batch_size", type=int, default=16, help="of stages 2 and 3")
    parser.add_argument("--toy", action="store_true", help="two narrow layers, also without a GPU")
    parser.add_argument("--model_type", default="gemma3_text", help="with --toy: as in config.json")
    arguments = parser.parse_args(argv)
    if not arguments.toy and arguments.model_type != "gemma3_text":
        parser.error("--model_type needs --toy")
    if torch.version.cuda is None:  # also once
        for module in MODULES:
            importlib.import_module(module)
    lines, states = ["| Step | State | Seconds | Figures |", "|---|---|---|---|"], {}
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(Path(folder), arguments.toy, arguments.model_type, arguments.batch_size)
        for name in with_needs(arguments.only or STEPS):
            began, trace = time.perf_counter(), ""
            lacking = [need for need in STEPS[name].needs if states[need] != "passed"]
            if lacking:
                states[name], text = "skipped", f"needs {', '.join(lacking)}"
            else:
                states[name], text, trace = run_apart(STEPS[name], plan)
            seconds = time.perf_counter() - began
            write(f"{trace}{name}: {states[name]}, {seconds:.1f} s: {text}")
            lines.append(f"| {name} | {states[name]} | {seconds:.0f} | {text.replace('|', '/')} |")
    write("\n" + "\n".join(lines))
    return 1 if "failed" in states.values() else 0


if __name__ == "__main__":
    sys.exit(main())
