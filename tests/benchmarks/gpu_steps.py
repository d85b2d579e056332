"""The steps of gpu.py that run the program: stages, prediction, a small card, resuming."""

import contextlib
import json
import shutil
import subprocess
import sys
from unittest import SkipTest, mock

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from common import ROOT, SAMPLE, machine, stage_maker, train
from memory import MIB, SHAPES, text_config
from transformers import Gemma3ForCausalLM

import medgemma_trainer as trainer
from medgemma_clinical.distributed import default_device, exact_kernels
from medgemma_clinical.evaluation import metrics
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.language_model import DEMO_FOLDER
from medgemma_clinical.training.signals import Stopped
from medgemma_clinical.training.state import read_state
from small_decoders import save_decoder

PATIENTS, TOY_PATIENTS, TRAINED = 500, 30, 120
"""Rows of the data, and how many the runs of the program take."""

STOP_AFTER = 5
"""Steps after which the run that is resumed is stopped."""

SAME_RISK = 0.02
"""Largest difference of a probability between batches of other shapes."""

SMALL_CARD, LARGE_BATCH = 6 * 2**30, 256
"""Bytes that hold a 4B model and little else, and rows of a step that do not fit beside it."""

VOCABULARY, WINDOW = 512, 32
"""Of the demo's tokenizer and of the shallow model: texts are longer."""

NARROW = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
PAIR_TIMEOUT = 240.0


def skip_without_gpu():
    if not torch.cuda.is_available():
        raise SkipTest("no GPU")


def run(*words):
    """Run the trainer, with intervals that need not be good; return what it prints."""
    metrics.REPLICATES = 20
    return train(*words)


def words_of(plan, mode, model, *more):
    """Return the flags of a short run of stage 2 or 3 in NF4 on a model of ``write_models``."""
    words = ["--mode", mode, "--model_name", plan.folder / model, "--quantization", "nf4"]
    words += ["--data_path", plan.folder / "data.csv", "--log_file", "none"]
    words += ["--batch_size", plan.batch_size, "--epochs", 1, "--max_samples", TRAINED]
    return [*words, *more]


def describe_machine(plan):
    """Describe card, driver and versions."""
    on = machine("torch", "transformers", "peft", "bitsandbytes")
    if not torch.cuda.is_available():
        return [f"no GPU; {on}"]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = "unknown"
    if shutil.which(query[0]):
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    card = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    memory = torch.cuda.mem_get_info()[1] / 2**30
    cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return [f"{card} ({memory:.1f} GiB), driver {driver}, {cuda}; {on}"]


def write_models(plan):
    """Write the data, and random weights in the shape of MedGemma-4B and of two layers of it.

    The shallow model has a small vocabulary and window.
    """
    data = plan.folder / "data.csv"
    pd.read_csv(SAMPLE, nrows=TOY_PATIENTS if plan.toy else PATIENTS).to_csv(data, index=False)
    shutil.copy(SAMPLE.with_suffix(".json"), data.with_suffix(".json"))
    if plan.model_type != "gemma3_text":
        for name in ("model", "shallow"):
            save_decoder(plan.folder / name, plan.model_type)
        return [f"two layers of {plan.model_type}"]
    narrow = {"vocab_size": VOCABULARY, **NARROW} if plan.toy else {}
    layers = 2 if plan.toy else SHAPES["4B"]["num_hidden_layers"]
    shallow = {"vocab_size": VOCABULARY, "sliding_window": WINDOW, **narrow}
    for name, config in {
        "model": text_config(layers, **narrow),
        "shallow": text_config(2, **shallow),
    }.items():
        config.initializer_range = config.hidden_size**-0.5  # the output can be sure of a token
        torch.manual_seed(0)
        with default_device():
            model = Gemma3ForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(plan.folder / name)
        for path in DEMO_FOLDER.glob("tokenizer*.json"):
            shutil.copy(path, plan.folder / name)
    size = sum(path.stat().st_size for path in (plan.folder / "model").iterdir())
    return [f"{size / 1e9:.1f} GB"]


def train_stage1(plan):
    """Train stage 1 for three epochs."""
    words = ["--trajectory_only", "--trajectory_epochs", 3, "--max_samples", TRAINED]
    words += ["--data_path", plan.folder / "data.csv", "--log_file", "none"]
    run(*words, "--output_dir", plan.folder / "runs")
    return [check_run(plan.folder / "runs" / "trajectory")]


def train_llm(plan, mode, *more, output="runs"):
    """Train stage 2 or 3 for an epoch on stage 1's encoder; stage 3 also writes reports."""
    folder, stage1 = plan.folder / output, plan.folder / "runs" / TRAJECTORY_FILE
    words = ["--ode_checkpoint", stage1, "--output_dir", folder, *more]
    printed = run(*words_of(plan, mode, "model", *words))
    config = json.loads((folder / mode / "best" / "config.json").read_text())
    assert config["quantization"] == "nf4", config["quantization"]
    figures = [check_run(folder / mode)]
    if torch.cuda.is_available():
        figures.append(f"peak {torch.cuda.max_memory_allocated() / MIB:,.0f} MiB")
    return figures + [line for line in printed.splitlines() if line.startswith("memory: ")]


def train_on_small_card(plan):
    """Train stage 2 where its batch does not fit: passes become smaller, then recompute."""
    skip_without_gpu()
    if plan.toy:
        raise SkipTest("two narrow layers fit any card")

    def small_info(*_):
        return SMALL_CARD - torch.cuda.memory_reserved(), SMALL_CARD

    torch.cuda.set_per_process_memory_fraction(SMALL_CARD / torch.cuda.mem_get_info()[1])
    more = ["--batch_size", LARGE_BATCH, "--max_samples", 0]
    with mock.patch.object(torch.cuda, "mem_get_info", small_info):
        figures = train_llm(plan, "classification", *more, output="small_card")
    for line in ("tokens a pass from now on", "gradient checkpointing is on from now on"):
        assert any(line in figure for figure in figures), f"no line {line!r}: {figures}"
    return figures


def check_run(folder):
    """Check that no step was skipped and each loss is finite; return steps, seconds and loss."""
    history = pd.read_json(folder / "history.jsonl", lines=True)
    assert not history["skipped_steps"].sum(), history["skipped_steps"].tolist()
    losses = history[["train_loss", "val_loss"]].to_numpy(float)
    assert np.isfinite(losses).all(), losses.tolist()
    assert (folder / "report.html").is_file(), "no report"
    steps, seconds = history["step"].iloc[-1], history["seconds"].sum()
    return f"{steps} steps and validation in {seconds:.1f} s, loss {losses[-1, 0]:.3f}"


def risks_of(path):
    """Return the probabilities of a file of predictions by id."""
    return pd.read_csv(path).set_index("id")["probability"]


def largest_difference(found, expected):
    """Return the largest difference of a probability, which must be small."""
    apart = float((found[expected.index] - expected).abs().max())
    assert apart <= SAME_RISK, f"a probability differs by {apart:.3f}"
    return apart


def predict(plan):
    """Predict all rows with stage 2's model; compare those of its test part with the run."""
    out, run_folder = plan.folder / "predictions.csv", plan.folder / "runs" / "classification"
    words = ["predict", "--checkpoint", run_folder, "--model_name", plan.folder / "model"]
    run(*words, "--data_path", plan.folder / "data.csv", "--predictions", out)
    found = risks_of(out)
    assert len(found) == (TOY_PATIENTS if plan.toy else PATIENTS), len(found)
    assert np.isfinite(found).all(), "a probability is not finite"
    apart = largest_difference(found, risks_of(run_folder / "predictions_test.csv"))
    return [f"{len(found)} rows; those of the run's test part within {apart:.1e}"]


def compare_reports(plan):
    """Write reports of unequal prompts in one batch and one by one, in float32: the same."""
    more = ["--quantization", "none", "--precision", "fp32"]
    stage = stage_maker(*words_of(plan, "generative", "shallow", *more))[2]()
    model, collate = stage.model.to(default_device()), stage.text
    for layer in model.llm.get_decoder().layers:  # they would only repeat their last token
        layer.post_attention_layernorm.weight.data.fill_(15.0)
    lengths = np.array([len(prompt) for prompt in collate.prompt_ids])
    order = np.argsort(lengths).tolist()
    rows = [*order[:4], *order[-4:]]  # the shortest beside the longest

    def generate(indices):
        prompts = collate.with_verdicts(indices, np.zeros(len(indices), dtype=bool))
        prompts = send_to_device(prompts, default_device())
        tokens = model.write(prompts, 8 if plan.toy else 64, collate.eos, collate.pad).tolist()
        return [[token for token in row if token != collate.pad] for row in tokens]

    together, alone = generate(rows), [generate([row])[0] for row in rows]
    assert len({tuple(row) for row in alone}) > 1, "all reports are the same: nothing is compared"
    differ = sum(a != b for a, b in zip(together, alone, strict=True))
    assert not differ, f"{differ} of {len(rows)} reports differ"
    tokens, prompts = sum(map(len, alone)), f"{lengths[rows].min()} to {lengths[rows].max()}"
    return [f"{len(rows)} reports of {tokens} tokens, prompts of {prompts} tokens: the same"]


def resume(plan, mode):
    """Stop a stage within its epoch, resume it, and compare with the undisturbed run."""
    args, _, make = stage_maker(*words_of(plan, mode, "shallow", "--batch_size", 4))
    step = trainer.step

    def stopping(state, *rest):
        return step(state, *rest) or state.progress.steps == STOP_AFTER

    def fit(name, **more):
        folder = plan.folder / f"{mode}-{name}"
        folder.mkdir(exist_ok=True)
        return trainer.fit(make(), args.seed, folder, save_every=3, **more)

    with exact_kernels(deterministic=True):
        whole = fit("whole")
        with mock.patch.object(trainer, "step", stopping), contextlib.suppress(Stopped):
            fit("stopped")
            raise AssertionError("was not stopped")
        state = read_state(plan.folder / f"{mode}-stopped" / "last")
        resumed = fit("stopped", resume=state)
    pairs = list(zip(whole.parameters, resumed.parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in pairs), "other weights than the undisturbed run"
    one, two = ([epoch["val_loss"] for epoch in run.progress.history] for run in (whole, resumed))
    assert one == two, (one, two)
    return [f"stopped after step {STOP_AFTER}: {len(pairs)} weights equal to the last bit"]


def compare_processes(plan):
    """Train stage 2 in two processes and in one of twice the batch; compare their risks."""
    skip_without_gpu()
    if torch.cuda.device_count() < 2:
        raise SkipTest("one card")
    risks = []
    for count in (1, 2):
        output = plan.folder / f"processes-{count}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(count), ROOT / "medgemma_trainer.py"]
        more = ["--lora_dropout", 0, "--batch_size", 8 // count, "--output_dir", output]
        command += map(str, words_of(plan, "classification", "shallow", *more))
        done = subprocess.run(command, capture_output=True, text=True, timeout=PAIR_TIMEOUT)
        assert not done.returncode, f"{count} processes ended with {done.stderr[-2000:]}"
        risks.append(risks_of(output / "classification" / "predictions_test.csv"))
    return [f"the same risks within {largest_difference(*risks):.1e}"]
