"""Compare stage 1 with deep models of PyPOTS on the same random splits.

    python tests/benchmarks/rivals.py [--data FILE.csv] [--seeds 5] [--models NAME,NAME]

GRU-D, BRITS, SAITS and iTransformer take a grid of equal steps (``--step_hours``): the mean of the
values in each step, standardised on the training part. They read no static features, so the like
comparison is that with stage 1 without them. All models stop early on the validation part: stage 1
by its AUROC, the others by their loss, as PyPOTS does. Each is trained in a process of its own.
Prints test AUROC and paired differences with intervals over the patients of all splits, seconds per
epoch, and the peak memory of the process.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import SAMPLE, machine, needed, peak_mib, train_stage1, write

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.evaluation.metrics_table import evaluate_splits
from medgemma_clinical.evaluation.tables import model_table

STATIC, NO_STATIC = "stage 1", "stage 1 without static features"
OURS = {
    STATIC: [],
    NO_STATIC: ["--facts", "off"],
    "five members of stage 1": ["--members", "5"],
}
"""Flags of the trainer."""

ATTENTION = {
    **{"n_layers": 2, "d_model": 64, "n_heads": 4, "d_k": 16, "d_v": 16, "d_ffn": 128},
    **{"dropout": 0.1, "attn_dropout": 0.1},
}
RIVALS = {
    "GRU-D": ("GRUD", {"rnn_hidden_size": 64}),
    "BRITS": ("BRITS", {"rnn_hidden_size": 64}),
    "SAITS": ("SAITS", ATTENTION),
    "iTransformer": ("iTransformer", ATTENTION),
}
"""Class of ``pypots.classification`` and its sizes: the width of stage 1, 64."""

PATIENCE = 10
"""Epochs without a better one; the default of the trainer too."""


def on_grid(dataset, hours):
    """Return (N, steps, F) the mean of the values in each step of a common clock, or NaN.

    The first step starts with the earliest observation of all rows.
    """
    step = np.floor((dataset.times - dataset.times.min()) / hours).astype(np.int64)
    row = np.repeat(np.arange(len(dataset)), dataset.lengths)
    means = pd.DataFrame(dataset.values).groupby([row, step]).mean()
    shape = (len(dataset), int(step.max()) + 1, dataset.values.shape[1])
    grid = np.full(shape, np.nan, dtype=np.float32)
    grid[means.index.get_level_values(0), means.index.get_level_values(1)] = means
    return grid


def rival_parts(dataset, seed, hours):
    """Return ``X`` and ``y`` of each part, standardised on the training part."""
    split = dataset.split(seed)
    grid = on_grid(dataset, hours)
    known = grid[split["train"]]
    grid = (grid - np.nanmean(known, axis=(0, 1))) / np.nanstd(known, axis=(0, 1))
    labels = dataset.labels.astype(np.int64)
    return {part: {"X": grid[rows], "y": labels[rows]} for part, rows in split.items()}


def train_rival(name, data, seed, epochs, hours):
    """Return the risks of the test part and the seconds per epoch."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        classes = needed("pypots.classification", "pypots")
        parts = rival_parts(MIMICtrajectoryDataset(data), seed, hours)
        kind, sizes = RIVALS[name]
        patience = min(PATIENCE, epochs)
        torch.manual_seed(seed)
        _, steps, features = parts["train"]["X"].shape
        shape = {"n_steps": steps, "n_features": features, "n_classes": 2}
        options = {"epochs": epochs, "patience": patience, "device": "cpu", "verbose": False}
        model = getattr(classes, kind)(**shape, **sizes, **options)
        began = time.perf_counter()
        model.fit(parts["train"], parts["val"])
        seconds = time.perf_counter() - began
        waited = patience - model.patience
        done = model.best_epoch + waited
        # Where training fails, PyPOTS goes on without a word, with the best weights so far.
        if done < epochs and waited < patience:
            raise RuntimeError(f"{name}: training failed in epoch {done + 1}")
        risks = model.predict_proba({"X": parts["test"]["X"]})[:, 1]
    return np.asarray(risks, dtype=np.float64), seconds / done


def train_ours(name, data, seed, epochs):
    """Return the risks of the test part and the seconds per epoch."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--max_samples", "0", "--trajectory_epochs", str(epochs), *OURS[name]]
        metrics = train_stage1(data, seed, folder, *flags)
        table = pd.read_csv(Path(folder, "trajectory", "predictions_test.csv"))
    return table["probability"].to_numpy(), metrics["seconds_an_epoch"]


def one_run(name, arguments, seed):
    """Train a model on a split; return the risks of its test part and what the run cost."""
    torch.set_num_threads(arguments.threads)
    if name in OURS:
        risks, seconds = train_ours(name, arguments.data, seed, arguments.epochs)
    else:
        hours = arguments.step_hours
        risks, seconds = train_rival(name, arguments.data, seed, arguments.epochs, hours)
    return {"risks": risks, "seconds per epoch": seconds, "MiB": peak_mib()}


def main(argv=None):
    names = [*OURS, *RIVALS]
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", type=lambda text: text.split(","), default=names)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--step_hours", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.models if name not in names]:
        parser.error(f"--models {unknown[0]}: choose among {', '.join(names)}")
    began = time.perf_counter()
    dataset = MIMICtrajectoryDataset(arguments.data)
    columns = {"id": dataset.ids, "patient": dataset.groups, "label": dataset.labels}
    spawn, tables, costs = multiprocessing.get_context("spawn"), [], []
    for seed in range(arguments.seeds):
        test = dataset.split(seed)["test"]
        table = pd.DataFrame({name: column[test] for name, column in columns.items()})
        for name in arguments.models:
            with ProcessPoolExecutor(1, spawn) as process:
                run = process.submit(one_run, name, arguments, seed).result()
            table[name] = run.pop("risks")
            costs.append({"model": name, **run})
        tables.append(table)
    on = machine("torch", threads=arguments.threads)
    write(f"{arguments.data.name}; {on}; {time.perf_counter() - began:.0f} s")
    for reference in [name for name in (STATIC, NO_STATIC) if name in table]:
        metrics = model_table(evaluate_splits(tables, 0, reference))
        write(f"{metrics.to_string(index=False)}\n")
    write(pd.DataFrame(costs).groupby("model").median().round(2).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
