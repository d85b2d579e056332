"""Compare ways to join stage 1 and the language model, on validation parts of seeded splits.

    python tests/benchmarks/fusion.py --stage 2 --model_name FOLDER --precision bf16 \\
        [--train 800] [--val 900] [--seeds 0,1] [--arms NAME,NAME] [--results FILE.jsonl]

Each split trains a stage 1, then every arm for one epoch on top of it. The arms that the program
does not have are subclasses and functions of this file. The test part is never scored. Each arm is
appended to the results file when it ends; a second call trains only what is missing there.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import SAMPLE, machine

import medgemma_trainer as trainer
from medgemma_clinical.commands.run_folder import run_data
from medgemma_clinical.data.texts import direction, plain
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import default_device, to_device
from medgemma_clinical.evaluation.comparison import compare_models
from medgemma_clinical.evaluation.predictions import Predictions
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.language_model import TINY, tiny_language_model
from medgemma_clinical.models.trajectory import Output
from medgemma_clinical.models.trajectory_llm import (
    VERDICT_WEIGHT,
    LLMClassifier,
    LLMWriter,
    TextBatch,
)
from medgemma_clinical.training.evaluate import evaluate
from medgemma_clinical.training.loaders import batches_of, make_loaders
from medgemma_clinical.training.optimizer import make_schedule
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.train_state import set_up_training, swapped_weights

STAGE1, BASE, LAST, OTHER = "stage 1", "base", "last weights", "other adapter"
CAPTIONS, CROSS, WORDS, MARGIN = "captions first", "cross attention", "summary words", "margin"
MEAN, WEIGHED = "mean of two adapters", "residual weight"
ARMS = {2: [BASE, CAPTIONS, CROSS, WORDS, OTHER], 3: [BASE, MARGIN]}
"""Arms that train; the others follow from their predictions."""

MODES = {2: ("classification", "none"), 3: ("generative", "all")}
"""Mode of each stage, and the series in its text."""

EVERY_LAYERS = 4
"""Decoder layers from one cross-attention to the next."""

GATE_SPEED = 20.0
"""Factor on a gate's parameter: one short epoch of small steps must be able to open the gate."""

WEIGHTS = np.linspace(0, 1, 11)
"""Candidates for the weight of the language model's residual logit."""


class GatedCrossAttention(nn.Module):
    """Let decoder layers read the encoder's states; gates that start at zero change nothing.

    Source: Alayrac et al. 2022, "Flamingo"; without its feed-forward layers.
    """

    def __init__(self, hidden_dim: int, width: int, layers: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(width, 4, kdim=hidden_dim, vdim=hidden_dim, batch_first=True)
            for _ in range(layers)
        )
        self.gates = nn.Parameter(torch.zeros(layers))

    def forward(self, layer: int, hidden: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Return hidden states (B, S, D) with what a layer reads of states (B, P, H) added."""
        size = hidden.float().square().mean(dim=-1, keepdim=True).sqrt()
        query = hidden.float() / size
        read, _ = self.attentions[layer](
            query, states, states, key_padding_mask=~mask, need_weights=False
        )
        read = functional.rms_norm(read, read.shape[-1:]) * size.detach()
        return hidden + (torch.tanh(GATE_SPEED * self.gates[layer]) * read).to(hidden.dtype)


class CrossAttending(LLMClassifier):
    """Stage 2 with gated cross-attention in the place of soft tokens."""

    def __init__(self, *parts: Any, **keywords: Any) -> None:
        super().__init__(*parts, **keywords)
        layers: Any = self.body.layers
        chosen = layers[EVERY_LAYERS - 1 :: EVERY_LAYERS] or layers[-1:]
        assert self.stage1 is not None
        hidden, width = self.stage1.encoder.hidden_dim, self.llm.config.hidden_size
        # The projection's name, and so its learning rate.
        self.projection = GatedCrossAttention(hidden, width, len(chosen))  # type: ignore[assignment]
        for number, layer in enumerate(chosen):
            layer.register_forward_hook(self.reader(number))

    def reader(self, number: int) -> Callable[..., Tensor]:
        """Return the hook of a layer."""

        def add(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            states, mask, *_ = self.read_states
            return self.projection(number, output, states, mask)  # type: ignore[misc]

        return add

    def read(self, batch: TextBatch, trajectory: Any) -> tuple[Tensor, Tensor]:
        self.read_states = trajectory
        return super().read(batch, None)


class MarginWriter(LLMWriter):
    """Stage 3 with a pairwise margin: each event of a batch above each other row."""

    def forward(self, batch: TextBatch) -> Output:
        output = super().forward(batch)
        labels = batch["labels"] == 1
        if not self.training or labels.all() or not labels.any():
            return output
        between = output.logit[labels][:, None] - output.logit[~labels]
        # As heavy as the verdict itself.
        margin = VERDICT_WEIGHT * len(labels) * functional.softplus(-between).mean()
        return output._replace(loss=output.loss + margin)


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


def caption(dataset: TrajectoryDataset, i: int) -> str:
    """Return what the projection learns to say of a patient's series."""
    clauses = []
    for feature, _, values in dataset.measured(i):
        figures = {"first": values[0], "last": values[-1]}
        figures |= {"lowest": values.min(), "highest": values.max()}
        stated = ", ".join(f"{word} {plain(value)}" for word, value in figures.items())
        trend = direction(values[-1] - values[0]).text
        clauses.append(f"{dataset.features[feature]} {stated}, {trend}")
    return "; ".join(clauses)


def with_summary(data: Data, logits: NDArray[np.float64]) -> Data:
    """Return the data with each series' mean and spread and stage 1's risk behind the context."""
    dataset = copy.copy(data.dataset)
    contexts = []
    for i, context in enumerate(dataset.contexts):
        words = [context.rstrip(". ")]
        for feature, _, values in dataset.measured(i):
            mean, spread = plain(round(values.mean(), 1)), plain(round(values.std(), 1))
            words.append(f"{dataset.features[feature]} mean {mean}, spread {spread}")
        contexts.append(". ".join([*words, f"Estimated risk {expit(logits[i]):.0%}"]))
    dataset.contexts = np.array(contexts, dtype=object)
    return dataclasses.replace(data, dataset=dataset)


# --------------------------------------------------------------------------- training


def quiet_main(words: list[str]) -> None:
    """Train stage 1 without a look at the test part."""
    no_results = mock.patch.object(trainer, "write_results", return_value={})
    with contextlib.redirect_stdout(io.StringIO()), no_results:
        if code := trainer.main([*words, "--log_file", "none"]):
            raise SystemExit(code)


@torch.no_grad()
def stage1_logits(args: argparse.Namespace, data: Data) -> NDArray[np.float64]:
    """Return the log-odds of each row by stage 1, (N,)."""
    stage1 = trainer.stage1_of(args, data)
    assert stage1 is not None
    batch = to_device(data.dataset.collate(range(len(data.dataset))), default_device())
    logits: NDArray[np.float64] = (
        stage1.to(default_device()).eval()(batch).logit.double().cpu().numpy()
    )
    return logits


def warm_up(stage: Stage, args: argparse.Namespace, dataset: TrajectoryDataset) -> None:
    """Train the projection alone, an epoch, so that the language model says each caption.

    The loss is over the tokens that captions use: the whole vocabulary would cost more than the
    rest of the step.
    """
    from transformers import AutoTokenizer

    model: Any = stage.model.to(default_device()).train()
    tiny = args.model_name == TINY
    tokenizer = tiny_language_model()[1] if tiny else AutoTokenizer.from_pretrained(args.model_name)
    texts = [caption(dataset, i) for i in range(len(dataset))]
    ids = [torch.tensor(x) for x in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    used = torch.cat(ids).unique()
    weight = model.llm.get_output_embeddings().weight[used.to(default_device())]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "projection" not in n]
    for parameter in others:
        parameter.requires_grad_(False)
    loader = stage.loaders["train"]
    optimizer = torch.optim.AdamW(model.projection.parameters(), lr=args.projection_lr)
    schedule, losses = make_schedule(optimizer, len(loader)), []
    for rows in batches_of(loader):
        chosen = [ids[i] for i in rows]
        padded = pad_sequence(chosen, batch_first=True, padding_value=-1)
        text = {"input_ids": padded.clamp(min=0), "text_mask": padded >= 0}
        batch = to_device({**loader.collate_fn(rows), **text}, default_device())
        hidden, start = model.read(batch, model.trajectory(batch))
        row, place = batch["text_mask"].nonzero(as_tuple=True)
        logits = functional.linear(hidden[row, start[row] + place - 1], weight).float()
        targets = torch.searchsorted(used, padded[padded >= 0]).to(logits.device)
        loss = functional.cross_entropy(logits, targets)
        loss.backward()
        clip_grad_norm_(model.projection.parameters(), trainer.LARGEST_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    sys.stderr.write(f"captions: loss {losses[0]:.3f}, at the end {np.mean(losses[-5:]):.3f}\n")
    for parameter in others:
        parameter.requires_grad_(True)


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
        stage = trainer.make_stage(args, data)
    began = time.perf_counter()
    if arm == CAPTIONS:
        warm_up(stage, args, data.dataset)
    state = set_up_training(stage, default_device())
    trainer.train_epoch(stage, state, args.seed)
    seconds = time.perf_counter() - began
    found = {}
    with swapped_weights(state.parameters, state.average.weights):
        found[arm] = score(stage, data)
    if arm == BASE and args.mode == "classification":
        found[LAST] = score(stage, data)
    return {"found": found, "seconds": seconds}


def score(stage: Stage, data: Data) -> Predictions:
    """Return the predictions of the validation part; no report is needed for a verdict."""
    collate: Any = stage.loaders["val"].collate_fn

    def prompts(rows: Any) -> TextBatch:
        batch: TextBatch = collate.with_verdicts(rows, np.zeros(len(rows), dtype=bool))
        return batch

    split = {"val": data.split["val"]}
    loader = make_loaders(split, batches_of(stage.loaders["train"]).batch_size, prompts)["val"]
    batches_of(loader).lengths = collate.lengths()
    return evaluate(stage.model, loader, default_device())


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
        quiet_main(["--trajectory_only", *shared])
        words = [*shared, "--mode", mode, "--series_text", series, "--epochs", "1"]
        words += ["--ode_checkpoint", str(Path(place, TRAJECTORY_FILE)), "--lora_dropout", "0"]
        words += ["--model_name", options.model_name, "--precision", options.precision]
        args = trainer.complete(trainer.build_parser().parse_args(words))
        data = run_data(args, trainer.read_dataset(args), trainer.prompt_options(args))
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


def weighed(table: pd.DataFrame, seed: int) -> NDArray[np.float64]:
    """Return logits with the residual weighed; each half's weight is chosen on the other half."""
    names, patient = np.unique(table["patient"], return_inverse=True)
    half = (np.random.default_rng(seed).permutation(len(names)) % 2)[patient]
    label, offset = table["label"].to_numpy(), table[STAGE1].to_numpy()
    candidates = offset + WEIGHTS[:, None] * (table[BASE].to_numpy() - offset)
    result, chosen = np.empty(len(table)), []
    for here in (half == 0, half == 1):
        losses = [log_loss(label[~here], expit(logit[~here])) for logit in candidates]
        chosen.append(int(np.argmin(losses)))
        result[here] = candidates[chosen[-1], here]
    sys.stdout.write(f"seed {seed}: residual weights {WEIGHTS[chosen].round(1).tolist()}\n")
    return result


def split_table(entries: list[dict[str, Any]], seed: int) -> pd.DataFrame:
    """Return patient, label and the probability of each arm for the validation rows of a split."""
    known = {entry["arm"]: entry for entry in entries if entry["seed"] == seed}
    logits = pd.DataFrame({arm: entry["logit"] for arm, entry in known.items()})
    rows = pd.DataFrame({name: known[BASE][name] for name in ("id", "patient", "label")})
    if OTHER in logits:
        logits[MEAN] = logits[[BASE, OTHER]].mean(axis=1)
    logits[WEIGHED] = weighed(rows.join(logits), seed)
    return rows.join(expit(logits))


def report(options: argparse.Namespace) -> None:
    """Print a line for each arm: all splits, then the paired difference in each."""
    entries = read_results(options)
    tables = [split_table(entries, seed) for seed in options.seeds]
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    tables = [table[shared] for table in tables]
    every = compare_models(tables, BASE, 0, 0)
    single = [compare_models([table], BASE, 0, 0) for table in tables]
    seconds = pd.DataFrame(entries).groupby("arm")["seconds"].median()

    def text(figure: dict[str, float]) -> str:
        return f"{figure['value']:+.4f} [{figure['low']:+.4f}, {figure['high']:+.4f}]"

    on = machine("torch", "transformers", threads=torch.get_num_threads())
    sys.stdout.write(f"{options.data.name}, stage {options.stage}; {on}\n")
    sys.stdout.write("| Arm | AUROC | Loss | AUROC minus base | Loss minus base |")
    sys.stdout.write("".join(f" AUROC, seed {seed} |" for seed in options.seeds) + " s |\n")
    for arm, figures in every.items():
        minus = figures["minus_reference"]
        cells = [arm, f"{figures['auroc']['value']:.4f}", f"{figures['log_loss']['value']:.4f}"]
        cells += [text(minus["auroc"]), text(minus["log_loss"])]
        cells += [text(each[arm]["minus_reference"]["auroc"]) for each in single]
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
