"""Compare ways to join stage 1 and the language model, on validation parts of seeded splits.

    python tests/benchmarks/fusion.py --stage 2 --model_name FOLDER --precision bf16 \\
        [--train 800] [--val 900] [--seeds 0,1] [--arms NAME,NAME] [--results FILE.jsonl]

Each split trains a stage 1, then every arm for one epoch on top of it. The arms that the program
does not have are in fusion_ways.py. The test part is never scored. Each arm is appended to the
results file when it ends; a second call trains only what is missing there.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.model_selection import train_test_split

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import SAMPLE, machine
from fusion_ways import CrossAttending, MarginWriter, warm_up, weighed, with_summary

import medgemma_trainer as trainer
from medgemma_clinical.commands import results
from medgemma_clinical.commands.flags import complete
from medgemma_clinical.commands.run_folder import given_stage1, run_data
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.distributed import default_device
from medgemma_clinical.evaluation.decision import Predictions
from medgemma_clinical.evaluation.metrics_table import evaluate, evaluate_splits
from medgemma_clinical.evaluation.verdicts import difference_text
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.language_model import TINY
from medgemma_clinical.models.trajectory_llm import (
    LLMClassifier,
    LLMWriter,
    TextBatch,
)
from medgemma_clinical.training.evaluate import evaluate as score_rows
from medgemma_clinical.training.loaders import LengthBatches
from medgemma_clinical.training.stage import Stage

STAGE1, BASE, LAST, OTHER = "stage 1", "base", "last weights", "other adapter"
CAPTIONS, CROSS, WORDS, MARGIN = "captions first", "cross attention", "summary words", "margin"
MEAN, WEIGHED = "mean of two adapters", "residual weight"
ARMS = {2: [BASE, CAPTIONS, CROSS, WORDS, OTHER], 3: [BASE, MARGIN]}
"""Arms that train; the others follow from their predictions."""

MODES = {2: ("classification", "none"), 3: ("generative", "all")}
"""Mode of each stage, and the series in its text."""

# --------------------------------------------------------------------------- data


def with_split(data: Path, sizes: dict[str, int], seed: int, copy_to: Path) -> Path:
    """Write some patients of a file, stratified by label, with a column split."""
    table = pd.read_csv(data, dtype=str)
    left = table.groupby("subject_id")["label_escalation"].max()
    parts: dict[str, str] = {}
    for part, size in sizes.items():
        chosen, left = train_test_split(left, train_size=size, stratify=left, random_state=seed)
        parts |= dict.fromkeys(chosen.index, part)
    table["split"] = table["subject_id"].map(parts)
    table.dropna(subset="split").to_csv(copy_to, index=False)
    description = data.with_name(f"{data.name.split('.')[0]}.json")
    shutil.copy(description, copy_to.with_suffix(".json"))
    return copy_to


# --------------------------------------------------------------------------- training


def train_stage1(words: list[str]) -> None:
    """Train stage 1 without a look at the test part."""
    no_results = mock.patch.object(results, "write_results", return_value={"stage": "trajectory"})
    with contextlib.redirect_stdout(io.StringIO()), no_results:
        if code := trainer.main(["--trajectory_only", *words, "--log_file", "none"]):
            raise SystemExit(code)


@torch.no_grad()
def stage1_logits(args: argparse.Namespace, data: Data) -> NDArray[np.float64]:
    """Return the log-odds of each row by stage 1, (N,)."""
    stage1 = trainer.make_stage1(args, data, given_stage1(args))
    batch = stage1.collate(data.dataset)(range(len(data.dataset)))
    batch = send_to_device(batch, default_device())
    logits: NDArray[np.float64] = (
        stage1.to(default_device()).eval()(batch).logit.double().cpu().numpy()
    )
    return logits


def train_arm(arm: str, args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Train an arm for an epoch; return its validation predictions by name, and seconds."""
    if arm == OTHER:
        args = argparse.Namespace(**{**vars(args), "seed": args.seed + 1000})
    if arm == WORDS:
        data = with_summary(data, stage1_logits(args, data))
    classifier = CrossAttending if arm == CROSS else LLMClassifier
    writer = MarginWriter if arm == MARGIN else LLMWriter
    with (
        mock.patch.object(trainer, "LLMClassifier", classifier),
        mock.patch.object(trainer, "LLMWriter", writer),
    ):
        stage = trainer.make_stage(args, data, given_stage1(args))
    began = time.perf_counter()
    if arm == CAPTIONS:
        warm_up(stage, args, data.dataset)
    state = trainer.set_up(stage)
    trainer.train_epoch(stage, state, args.seed)
    seconds = time.perf_counter() - began
    found = {}
    with state.swapped_weights(state.average.weights):
        found[arm] = score(stage, data)
    if arm == BASE and args.mode == "classification":
        found[LAST] = score(stage, data)
    return {"found": found, "seconds": seconds}


def score(stage: Stage, data: Data) -> Predictions:
    """Return the predictions of the validation part; no report is needed for a verdict."""
    collate: Any = stage.text

    def prompts(rows: Any) -> TextBatch:
        batch: TextBatch = collate.with_verdicts(rows, np.zeros(len(rows), dtype=bool))
        return batch

    size, lengths = stage.batch_size, collate.lengths()
    batches = LengthBatches(data.split["val"], size, lengths, shuffle=False)
    return score_rows(stage.model, batches, prompts)


def one_split(options: argparse.Namespace, seed: int) -> None:
    """Train what the results lack of a split."""
    done = {each["arm"] for each in read_results(options) if each["seed"] == seed}
    arms = [arm for arm in options.arms if arm not in done]
    if not arms:
        return
    mode, series = MODES[options.stage]
    with tempfile.TemporaryDirectory() as place:
        sizes = {"train": options.train, "val": options.val, "test": options.test}
        data_path = with_split(options.data, sizes, seed, Path(place, "data.csv"))
        shared = ["--data_path", str(data_path), "--seed", str(seed), "--output_dir", place]
        train_stage1(shared)
        words = [*shared, "--mode", mode, "--series_text", series, "--epochs", "1"]
        words += ["--ode_checkpoint", str(Path(place, TRAJECTORY_FILE)), "--lora_dropout", "0"]
        words += ["--model_name", options.model_name, "--precision", options.precision]
        args = complete(trainer.build_parser().parse_args(words))
        dataset, prompts = trainer.read_dataset(args), trainer.prompt_options(args)
        data = run_data(args, dataset, prompts, given_stage1(args))
        if STAGE1 not in done:
            logits = stage1_logits(args, data)[data.split["val"]]
            append(options, data, seed, STAGE1, logits, 0.0)
        for arm in arms:
            result = train_arm(arm, args, data)
            for name, predictions in result["found"].items():
                append(options, data, seed, name, predictions.logit, result["seconds"])


# --------------------------------------------------------------------------- results


def append(
    options: argparse.Namespace,
    data: Data,
    seed: int,
    arm: str,
    logit: NDArray[np.float64],
    seconds: float,
) -> None:
    """Add the validation predictions of an arm to the results."""
    rows, dataset = data.split["val"], data.dataset
    columns = {"id": dataset.ids, "patient": dataset.groups, "label": dataset.labels}
    entry = {"stage": options.stage, "seed": seed, "arm": arm, "seconds": round(seconds, 1)}
    entry |= {name: column[rows].tolist() for name, column in columns.items()}
    with options.results.open("a") as file:
        file.write(json.dumps({**entry, "logit": logit.tolist()}) + "\n")
    sys.stderr.write(f"stage {options.stage}, seed {seed}, {arm}: {seconds:.0f} s\n")


def read_results(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what is known of the stage."""
    if not options.results.exists():
        return []
    entries = map(json.loads, options.results.read_text().splitlines())
    return [entry for entry in entries if entry["stage"] == options.stage]


def split_table(entries: list[dict[str, Any]], seed: int) -> pd.DataFrame:
    """Return patient, label and the probability of each arm for the validation rows of a split."""
    known = {entry["arm"]: entry for entry in entries if entry["seed"] == seed}
    logits = pd.DataFrame({arm: entry["logit"] for arm, entry in known.items()})
    rows = pd.DataFrame({name: known[BASE][name] for name in ("id", "patient", "label")})
    if OTHER in logits:
        logits[MEAN] = logits[[BASE, OTHER]].mean(axis=1)
    offset, logit = logits[STAGE1].to_numpy(), logits[BASE].to_numpy()
    label, patients = rows["label"].to_numpy(), rows["patient"].to_numpy()
    logits[WEIGHED], chosen = weighed(label, offset, logit, patients, seed)
    sys.stdout.write(f"seed {seed}: residual weights {chosen}\n")
    return rows.join(expit(logits))


def report(options: argparse.Namespace) -> None:
    """Print a line for each arm: all splits, then the paired difference in each."""
    entries = read_results(options)
    tables = [split_table(entries, seed) for seed in options.seeds]
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    tables = [table[shared] for table in tables]
    every = evaluate_splits(tables, 0, BASE)
    single = [evaluate(table, 0, reference=BASE) for table in tables]
    seconds = pd.DataFrame(entries).groupby("arm")["seconds"].median()

    on = machine("torch", "transformers", threads=torch.get_num_threads())
    sys.stdout.write(f"{options.data.name}, stage {options.stage}; {on}\n")
    sys.stdout.write("| Arm | AUROC | Loss | AUROC minus base | Loss minus base |")
    sys.stdout.write("".join(f" AUROC, seed {seed} |" for seed in options.seeds) + " s |\n")
    for arm in every.models:
        auroc, loss = (every.of(arm).loc[name] for name in ("auroc", "log_loss"))
        cells = [arm, f"{auroc['value']:.4f}", f"{loss['value']:.4f}"]
        cells += [difference_text(row, "+.4f") for row in (auroc, loss)]
        cells += [difference_text(each.of(arm).loc["auroc"], "+.4f") for each in single]
        cells.append(f"{seconds.get(arm, 0):.0f}")
        sys.stdout.write(f"| {' | '.join(cells)} |\n")


def main() -> None:
    """Train the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", type=int, choices=(2, 3), default=2)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--model_name", default=TINY)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--train", type=int, default=800, help="patients")
    parser.add_argument("--val", type=int, default=900, help="patients")
    parser.add_argument("--test", type=int, default=150, help="patients, never scored")
    parser.add_argument("--seeds", type=lambda text: [*map(int, text.split(","))], default=[0, 1])
    parser.add_argument("--arms", type=lambda text: text.split(","))
    parser.add_argument("--results", type=Path, default=Path("fusion.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.arms = options.arms or ARMS[options.stage]
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        one_split(options, seed)
    report(options)


if __name__ == "__main__":
    main()
