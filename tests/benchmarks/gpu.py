"""The first session on a GPU, in ten minutes: does everything work on CUDA, how fast, how large?

    python tests/benchmarks/gpu.py
    python tests/benchmarks/gpu.py --toy            # two narrow layers, also without a GPU
    python tests/benchmarks/gpu.py --toy --model_type qwen3          # of another type of model

Needs no network and no weights: random ones in the shape of MedGemma-4B are written to a temporary
folder (8 GB, TMPDIR says where). Each step runs in a process of its own, so that a fault of the
card, an exhausted memory or a hanging step leaves the others alone. A step passes, fails or is
skipped; a finding deserves attention without being a failure. At the end it prints a table. Exit
code 1 if a step failed.

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

from medgemma_clinical.distributed import exact_kernels

FORK = multiprocessing.get_context("fork")
"""This process must not touch the card: its children could not use it. bitsandbytes touches it when
it is imported, so the modules of the steps are imported in the children."""

MODULES = ("gpu_steps", "gpu_kernels")
TIMEOUT = 600.0
"""Seconds after which a step counts as hanging."""

STEPS = {
    "Machine": ("gpu_steps.describe_machine",),
    "Random weights": ("gpu_steps.write_models",),
    "Gradients, cuDNN attention off": ("gpu_kernels.compare_gradients", False),
    "Gradients, cuDNN attention on": ("gpu_kernels.compare_gradients", True),
    "Products in NF4": ("gpu_kernels.compare_products",),
    "Stage 1 trained": ("gpu_steps.train_stage1",),
    "Stage 2 trained": ("gpu_steps.train_llm", "classification"),
    "Stage 2 predicts": ("gpu_steps.predict",),
    "Stage 3 trained": ("gpu_steps.train_llm", "generative"),
    "Stage 2, dry run": ("gpu_steps.dry_run", "classification"),
    "Stage 3, dry run": ("gpu_steps.dry_run", "generative"),
    "Stage 2, speed and memory": ("gpu_kernels.measure_llm", "classification"),
    "Stage 3, speed and memory": ("gpu_kernels.measure_llm", "generative"),
    "Stage 2, compiled layers": ("gpu_kernels.measure_compiled",),
    "Reports in a batch and one by one": ("gpu_steps.compare_reports",),
    "Stage 2 resumed": ("gpu_steps.resume", "classification"),
    "Stage 3 resumed": ("gpu_steps.resume", "generative"),
    "Stage 1, speed": ("gpu_kernels.measure_stage1",),
    "Two processes": ("gpu_steps.compare_processes",),
}
"""Function of each step and its arguments after the plan; the most important first.

A function returns its result as text, and after it the findings."""


class Plan(NamedTuple):
    """What the steps share: a folder, whether the models have two narrow layers, their type."""

    folder: Path
    toy: bool = False
    model_type: str = "gemma3_text"


def attempt(step, plan, sender):
    """Run a step; send its state, result, findings, and the traceback of a failure."""
    output = io.StringIO()
    name, *arguments = step
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            module, _, function = name.partition(".")
            work = getattr(importlib.import_module(module), function)
            with exact_kernels():
                result, *findings = work(plan, *arguments)
        sender.send(("passed", result, findings, ""))
    except SkipTest as reason:
        sender.send(("skipped", str(reason), [], ""))
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        printed = "\n".join(output.getvalue().splitlines()[-40:])
        sender.send(("failed", reason, [], f"{printed}\n{traceback.format_exc()}"))


def run_apart(step, plan):
    """Run a step in a process of its own; return what ``attempt`` sends."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=attempt, args=(step, plan, sender))
    child.start()
    sender.close()
    try:
        known = receiver.poll(TIMEOUT)
        outcome = receiver.recv() if known else ("failed", f"hangs: {TIMEOUT:.0f} s", [], "")
    except EOFError:
        child.join()
        outcome = ("failed", f"the process ended with {child.exitcode}", [], "")
    child.kill()
    child.join()
    return outcome


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--toy", action="store_true", help="two narrow layers, also without a GPU")
    parser.add_argument("--model_type", default="gemma3_text", help="with --toy: as in config.json")
    arguments = parser.parse_args(argv)
    if not arguments.toy and arguments.model_type != "gemma3_text":
        parser.error("--model_type needs --toy")
    if torch.version.cuda is None:  # once, not in each step
        for module in MODULES:
            importlib.import_module(module)
    lines, failed, found = ["| Step | Result | Measured |", "|---|---|---|"], [], []
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(Path(folder), arguments.toy, arguments.model_type)
        for name, step in STEPS.items():
            began = time.perf_counter()
            state, result, findings, trace = run_apart(step, plan)
            seconds = time.perf_counter() - began
            write(f"{trace}{name}: {state}, {seconds:.1f} s: {result}")
            lines.append(f"| {name} | {state}, {seconds:.0f} s | {result.replace('|', '/')} |")
            found += findings
            failed += [name] if state == "failed" else []
    write("\n" + "\n".join(lines))
    for title, each in (("Findings", found), ("Failed", failed)):
        if each:
            write(f"\n{title}:\n" + "\n".join(f"- {text}" for text in each))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
