"""The first session on a card, in ten minutes: does everything work on CUDA, how fast, how large?

    python tests/benchmarks/gpu.py [--peak_tflops 989]
    python tests/benchmarks/gpu.py --toy            # two narrow layers, also without a GPU

Needs no network and no weights: random ones in the shape of MedGemma-4B are written to a temporary
folder (8 GB, TMPDIR says where). Each step runs in a process of its own, so that a fault of the
card, an exhausted memory or a step that hangs leaves the others alone. A step passes, fails or is
skipped; what deserves a look without being a failure is a finding. At the end stands a table to
paste into docs/training.md. Exit code 1 where a step failed.

Where the ten minutes go (estimated for an A100 or H100; not run there yet):

- writing the weights: half a minute;
- gradients with cuDNN off and on, products in NF4, two layers: a minute;
- three stages, a prediction and two dry runs through the program in NF4: four minutes; each of
  these five loads the 8 GB, a step of training takes below a second;
- speed and memory of stages 2 and 3: two minutes; each loads once for both ways;
- reports, resuming (two layers) and stage 1: two minutes.

With ``--peak_tflops`` (dense bfloat16 by the data sheet: 989 of an H100 SXM, 312 of an A100) the
share of it that training reaches is printed. The byte tokenizer makes prompts two to three times as
long as Gemma's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (0, 1)]

import torch  # noqa: E402  (the places of these are told before)
from common import machine  # noqa: E402
from gpu_plan import Plan, Result, SkippedError, on_gpu  # noqa: E402

from medgemma_clinical.distributed import exact_kernels  # noqa: E402

MODULES = ("gpu_steps", "gpu_attention", "gpu_speed")
"""Hold the steps. They import the program, and so bitsandbytes, which touches the card."""

FORK = multiprocessing.get_context("fork")
"""This process never touches the card: a child could not use it any more."""

LONGEST = 600.0
"""Seconds after which a step counts as hanging."""

TAIL = 40
"""Lines of a failed step's output that are shown."""

Step = Callable[[Plan], Result] | str
"""A function, or its name in one of the modules: MODULE.NAME."""


def describe_machine(plan: Plan) -> Result:
    """Describe card, driver and versions."""
    on = machine("torch", "transformers", "peft", "bitsandbytes")
    if not on_gpu():
        return Result(f"no GPU; {on}")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver, findings = "unknown", []
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError as error:
        findings.append(f"nvidia-smi: {error.strerror}")
    memory = torch.cuda.mem_get_info()[1] / 2**30
    return Result(
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} ({memory:.1f} GiB), driver "
        f"{driver}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}; {on}",
        tuple(findings),
    )


STEPS: dict[str, Step] = {
    "Machine": describe_machine,
    "Random weights": "gpu_steps.write_models",
    "Gradients, cuDNN attention off": "gpu_attention.gradients_without_cudnn",
    "Gradients, cuDNN attention on": "gpu_attention.gradients_with_cudnn",
    "Products in NF4": "gpu_attention.compare_products",
    "Stage 1 trained": "gpu_steps.train_stage_1",
    "Stage 2 trained": "gpu_steps.train_stage_2",
    "Stage 2 predicts": "gpu_steps.predict_stage_2",
    "Stage 3 trained": "gpu_steps.train_stage_3",
    "Stage 2, dry run": "gpu_steps.dry_run_stage_2",
    "Stage 3, dry run": "gpu_steps.dry_run_stage_3",
    "Stage 2, speed and memory": "gpu_speed.measure_stage_2",
    "Stage 3, speed and memory": "gpu_speed.measure_stage_3",
    "Reports in a batch and one by one": "gpu_steps.compare_reports",
    "Stage 2 resumed": "gpu_steps.resume_stage_2",
    "Stage 3 resumed": "gpu_steps.resume_stage_3",
    "Stage 1, speed": "gpu_speed.measure_stage_1",
    "Two processes": "gpu_steps.compare_processes",
}
"""In the order of importance: what a first session must know comes first."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ``passed``, ``failed`` or ``skipped``; its figures or the reason."""

    state: str
    figures: str
    findings: tuple[str, ...] = ()
    trace: str = ""
    seconds: float = 0.0


def found(step: Step) -> Callable[[Plan], Result]:
    """Return the function of a step; its module is imported here."""
    if not isinstance(step, str):
        return step
    module, _, name = step.partition(".")
    function: Callable[[Plan], Result] = getattr(importlib.import_module(module), name)
    return function


def attempt(step: Step, plan: Plan) -> Outcome:
    """Take a step; whatever goes wrong in it is an outcome."""
    output = io.StringIO()
    try:
        shown = contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)
        with shown[0], shown[1], exact_kernels():
            result = found(step)(plan)
    except SkippedError as reason:
        return Outcome("skipped", str(reason))
    except BaseException as error:
        tail = "\n".join(output.getvalue().splitlines()[-TAIL:])
        reason_ = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome("failed", reason_[:300], trace=f"{tail}\n{traceback.format_exc()}")
    return Outcome("passed", result.figures, result.findings)


def run_apart(step: Step, plan: Plan) -> Outcome:
    """Take a step in a process of its own."""

    def work(sender: Connection) -> None:
        sender.send(attempt(step, plan))

    began = time.perf_counter()
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=work, args=(sender,))
    child.start()
    sender.close()
    try:
        known = receiver.poll(LONGEST)
        outcome = receiver.recv() if known else Outcome("failed", f"hangs: {LONGEST:.0f} s")
    except EOFError:
        child.join()
        outcome = Outcome("failed", f"the process ended with {child.exitcode}")
    child.kill()
    child.join()
    return replace(outcome, seconds=time.perf_counter() - began)


def table(outcomes: dict[str, Outcome]) -> str:
    """Return the Markdown table of all steps."""
    lines = ["| Step | Result | Figures |", "|---|---|---|"]
    for name, outcome in outcomes.items():
        figures = outcome.figures.replace("|", "/")
        lines.append(f"| {name} | {outcome.state}, {outcome.seconds:.0f} s | {figures} |")
    return "\n".join(lines)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--toy", action="store_true", help="two narrow layers, also without a GPU")
    parser.add_argument("--peak_tflops", type=float)
    arguments = parser.parse_args(argv)
    if torch.version.cuda is None:  # once, not in each step
        for module in MODULES:
            importlib.import_module(module)
    outcomes = {}
    with tempfile.TemporaryDirectory() as place:
        plan = Plan(Path(place), arguments.toy, arguments.peak_tflops)
        for name, step in STEPS.items():
            outcomes[name] = outcome = run_apart(step, plan)
            if outcome.trace:
                say(outcome.trace)
            say(f"{name}: {outcome.state}, {outcome.seconds:.1f} s: {outcome.figures}")
    say(f"\n{table(outcomes)}")
    findings = [text for outcome in outcomes.values() for text in outcome.findings]
    if findings:
        say("\nFindings:\n" + "\n".join(f"- {text}" for text in findings))
    failed = [name for name, outcome in outcomes.items() if outcome.state == "failed"]
    if failed:
        say("\nFailed: " + ", ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
