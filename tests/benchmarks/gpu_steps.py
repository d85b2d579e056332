"""The steps of gpu.py that run the program: three stages, prediction, dry runs, resuming."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from common import SAMPLE
from gpu_attention import WINDOW
from gpu_plan import (
    Plan,
    Result,
    SkippedError,
    arguments_of,
    data_of,
    on_gpu,
    run_program,
    skip_without_gpu,
)
from memory import LAYERS, MIB, text_config
from transformers import Gemma3ForCausalLM

import medgemma_trainer as trainer
from faults import launch, result_of
from medgemma_clinical.distributed import default_device
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.language_model import tiny_language_model

STOP_AFTER = 5
"""Steps after which SIGTERM stops the run that is resumed."""

REPORT_TOKENS = 64
LONGEST_PAIR = 240.0
"""Seconds after which two processes count as hanging."""

SAME_RISK = 0.02
"""Most that a probability may differ between batches of other shapes."""

BYTES = 259
"""Vocabulary of the byte tokenizer."""

TOY = {"vocab_size": BYTES, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def write_models(plan: Plan) -> Result:
    """Write the data, and random weights in the shape of MedGemma-4B and of two layers of it."""
    began = time.perf_counter()
    pd.read_csv(SAMPLE, nrows=plan.patients).to_csv(plan.data, index=False)
    shutil.copy(SAMPLE.with_suffix(".json"), plan.data.with_suffix(".json"))
    narrow = TOY if plan.toy else {}
    save_model(plan.shallow, 2, **{"vocab_size": BYTES, "sliding_window": WINDOW, **narrow})
    save_model(plan.model, 2 if plan.toy else LAYERS, **narrow)
    size = sum(path.stat().st_size for path in plan.model.iterdir())
    return Result(f"{size / 1e9:.1f} GB in {time.perf_counter() - began:.0f} s")


def save_model(folder: Path, layers: int, **sizes: int) -> None:
    """Write a Gemma 3 with random weights and the byte tokenizer."""
    config = text_config(layers, **sizes)
    config.initializer_range = config.hidden_size**-0.5  # the tied output can be sure of a token
    torch.manual_seed(0)
    with default_device():
        model = Gemma3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_language_model()[1].save_pretrained(folder)


def words_of(plan: Plan, mode: str, model: Path, output: Path, *more: str) -> list[str]:
    """Return the flags of a short run of stage 2 or 3 in NF4."""
    words = ["--mode", mode, "--model_name", str(model), "--quantization", "nf4", "--epochs", "1"]
    words += ["--batch_size", "4", "--data_path", str(plan.data), "--output_dir", str(output)]
    return [*words, "--log_file", "none", *more]


def train_stage_1(plan: Plan) -> Result:
    """Train stage 1 for three epochs."""
    words = ["--trajectory_only", "--trajectory_epochs", "3", "--data_path", str(plan.data)]
    run_program(*words, "--log_file", "none", "--output_dir", str(plan.runs))
    return Result(check_run(plan.runs / "trajectory"))


def train_stage_2(plan: Plan) -> Result:
    """Train stage 2 for an epoch with stage 1's encoder."""
    return train_llm(plan, "classification")


def train_stage_3(plan: Plan) -> Result:
    """Train stage 3 for an epoch with stage 1's encoder; the run writes reports at its end."""
    return train_llm(plan, "generative")


def train_llm(plan: Plan, mode: str) -> Result:
    encoder = ["--ode_checkpoint", str(plan.runs / TRAJECTORY_FILE)]
    printed = run_program(*words_of(plan, mode, plan.model, plan.runs, *encoder))
    config = json.loads((plan.runs / mode / "best" / "config.json").read_text())
    assert config["quantization"] == "nf4", config["quantization"]
    peak = f", peak {torch.cuda.max_memory_allocated() / MIB:,.0f} MiB" if on_gpu() else ""
    told = [line for line in printed.splitlines() if line.startswith("memory: ")]
    return Result(check_run(plan.runs / mode) + peak, tuple(told))


def check_run(folder: Path) -> str:
    """Return the figures of a finished run.

    Raises:
        AssertionError: a step was skipped, or a loss is not finite.
    """
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    last = history[-1]
    skipped = sum(epoch["skipped_steps"] for epoch in history)
    assert not skipped, f"{skipped} of {last['step']} steps were not finite"
    losses = [epoch[name] for epoch in history for name in ("train_loss", "val_loss")]
    assert all(map(math.isfinite, losses)), losses
    assert (folder / "report.html").is_file(), "no report"
    seconds = sum(epoch["seconds"] for epoch in history)
    return f"{last['step']} steps and validation in {seconds:.1f} s, loss {last['train_loss']:.3f}"


def predict_stage_2(plan: Plan) -> Result:
    """Predict all rows with stage 2's model; those of its test part must get the same risk."""
    out = plan.folder / "predictions.csv"
    words = ["--predict", "--checkpoint", str(plan.runs / "classification")]
    words += ["--model_name", str(plan.model), "--data_path", str(plan.data)]
    run_program(*words, "--predictions", str(out))
    found = pd.read_csv(out).set_index("id")["probability"]
    assert len(found) == plan.patients, len(found)
    assert np.isfinite(found).all(), "a probability is not finite"
    test = risks_of(plan.runs / "classification")
    apart = float((found[test.index] - test).abs().max())
    assert apart <= SAME_RISK, f"a risk differs by {apart:.3f} from that of the run"
    return Result(f"{len(found)} rows, risks of the run's test part within {apart:.1e}")


def risks_of(folder: Path) -> pd.Series[float]:
    """Return the probabilities of a run's test part by id."""
    return pd.read_csv(folder / "predictions_test.csv").set_index("id")["probability"]


def dry_run_stage_2(plan: Plan) -> Result:
    """Measure stage 2 at batch 4 by ``--dry_run``."""
    return dry_run(plan, "classification")


def dry_run_stage_3(plan: Plan) -> Result:
    """Measure stage 3 at batch 4 by ``--dry_run``."""
    return dry_run(plan, "generative")


def dry_run(plan: Plan, mode: str) -> Result:
    printed = run_program(*words_of(plan, mode, plan.model, plan.folder / "dry", "--dry_run"))
    told = [line for line in printed.splitlines() if line.startswith("dry run: ")]
    assert told, "no line tells what was measured"
    assert not (plan.folder / "dry").exists(), "a dry run has written"
    return Result(told[-1].removeprefix("dry run: "))


def compare_reports(plan: Plan) -> Result:
    """Write reports of unequal prompts in one batch and one by one, in float32.

    Raises:
        AssertionError: they are not the same.
    """
    words = ["--mode", "generative", "--model_name", str(plan.shallow), "--quantization", "none"]
    args = arguments_of(*words, "--precision", "fp32", "--max_samples", "200")
    stage = trainer.make_stage(args, data_of(args), None)
    model: Any = stage.model.to(default_device())
    for layer in model.llm.get_decoder().layers:  # they would only repeat their last token
        layer.post_attention_layernorm.weight.data.fill_(15.0)
    collate: Any = stage.text
    lengths = np.array([len(prompt) for prompt in collate.prompt_ids])
    order = np.argsort(lengths).tolist()
    rows = [*order[:4], *order[-4:]]  # the shortest beside the longest

    def write(indices: list[int]) -> list[list[int]]:
        prompts = collate.with_verdicts(indices, np.zeros(len(indices), dtype=bool))
        prompts = send_to_device(prompts, default_device())
        ids = model.write(prompts, REPORT_TOKENS, collate.eos, collate.pad).tolist()
        return [[token for token in row if token != collate.pad] for row in ids]

    together, alone = write(rows), [write([row])[0] for row in rows]
    assert len({tuple(row) for row in alone}) > 1, "all reports are the same: nothing is compared"
    differ = sum(a != b for a, b in zip(together, alone, strict=True))
    assert not differ, f"{differ} of {len(rows)} reports differ"
    return Result(
        f"{len(rows)} reports of {sum(map(len, alone))} tokens, prompts of {lengths[rows].min()} "
        f"to {lengths[rows].max()} tokens: the same"
    )


def resume_stage_2(plan: Plan) -> Result:
    """Stop stage 2 in its epoch, resume it, and compare with the undisturbed run."""
    return resume(plan, "classification")


def resume_stage_3(plan: Plan) -> Result:
    """Stop stage 3 in its epoch, resume it, and compare with the undisturbed run."""
    return resume(plan, "generative")


def resume(plan: Plan, mode: str) -> Result:
    whole, stopped = plan.folder / "whole", plan.folder / "stopped"
    more = ["--deterministic", "--save_every", "3"]
    run_program(*words_of(plan, mode, plan.shallow, whole, *more))
    words = words_of(plan, mode, plan.shallow, stopped, *more)
    step = trainer.step

    def stop(state: Any, *rest: Any) -> bool:
        if state.progress.steps == STOP_AFTER - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *rest)

    with mock.patch.object(trainer, "step", stop):
        run_program(*words, code=128 + signal.SIGTERM)
    run_program(*words, "--resume")
    expected, found = result_of(whole, mode), result_of(stopped, mode)
    other = [name for name in expected if found.get(name) != expected[name]]
    assert not other, f"other than in the undisturbed run: {', '.join(other)}"
    return Result(f"stopped after step {STOP_AFTER}: {len(expected)} results equal to the last bit")


def compare_processes(plan: Plan) -> Result:
    """Train stage 2 in two processes and in one of twice the batch; compare their risks."""
    skip_without_gpu()
    if torch.cuda.device_count() < 2:
        raise SkippedError("one card")
    for count in (1, 2):
        output = plan.folder / f"processes-{count}"
        words = words_of(plan, "classification", plan.shallow, output, "--lora_dropout", "0")
        running = launch(count, [*words, "--batch_size", str(8 // count)], plan.folder)
        try:
            _, errors = running.communicate(timeout=LONGEST_PAIR)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            raise
        assert not running.returncode, f"{count} processes ended with {errors[-2000:]}"
    one, two = (risks_of(plan.folder / f"processes-{n}" / "classification") for n in (1, 2))
    apart = float((two[one.index] - one).abs().max())
    assert apart <= SAME_RISK, f"a risk differs by {apart:.3f} from that of one process"
    return Result(f"the same risks within {apart:.1e}")
