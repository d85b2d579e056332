"""Compare an epoch of stage 1 with the calls of its encoder alone.

    python tests/benchmarks/epoch.py [--patients 3000] [--batch_size 16] [--threads 1] [--repeats 7]

Sample data, the program's defaults. The ways run in turn, so that a load on the machine meets all:

    encoder   forward and backward over the batches that train, forward alone over those that
              validate; the batches are ready, each call plans for itself, the gradient of the
              states is made of ones
    planned   the same with plans that are ready, too
    model     as planned, with the head and its loss
    training  ``train_epoch``: batches made, gradients clipped, weights moved and averaged
    epoch     training, its checkpoint, validation, best weights and history, written to the disk

Prints elapsed and processor milliseconds of an epoch, and the ratio to the encoder's in the same
round. An epoch shall take at most 1.6 times its encoder's calls. ``--profile`` prints where an
epoch's time goes.
"""

import argparse
import cProfile
import logging
import math
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import SAMPLE, machine

import medgemma_trainer as trainer
from medgemma_clinical.commands.flags import complete
from medgemma_clinical.data.training_data import prepare_data
from medgemma_clinical.data.trajectories import Batch
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from medgemma_clinical.training.state import StateStore

TARGET = 1.6


def ways(patients: int, batch_size: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what is timed; ``patients`` train."""
    words = ["--trajectory_only", "--data_path", str(SAMPLE), "--batch_size", str(batch_size)]
    args = complete(trainer.build_parser().parse_args(words))
    data = prepare_data(
        trainer.read_dataset(args),
        max_samples=round(patients / 0.8),
        seed=0,
        prompts=trainer.prompt_options(args),
    )
    stage = trainer.make_stage(args, data, None)
    assert isinstance(stage.model, TrajectoryClassifier)
    stage.patience = stage.epochs = 10**6
    state, store = trainer.set_up(stage), StateStore(folder / "last")
    encoder, model = stage.model.encoder, stage.model
    train, held_out = ([*map(stage.collate, stage.batches[part])] for part in ("train", "val"))
    sys.stdout.write(
        f"{len(data.split['train'])} patients train in {len(train)} batches of {batch_size}, "
        f"{len(data.split['val'])} validate in {len(held_out)}\n"
    )

    def states_of(batch: Batch, *, planned: bool) -> Tensor:
        if planned:
            states: Tensor = encoder.run(batch["plan"])
        else:
            series = batch["times"], batch["values"], batch["observed"]
            states = encoder(*series, batch["prediction_hours"])
        return states

    with torch.no_grad():
        for batch in [*train, *held_out]:
            if not torch.equal(states_of(batch, planned=True), states_of(batch, planned=False)):
                raise SystemExit("a ready plan gives other states: nothing to compare")

    def encoder_calls(*, planned: bool) -> None:
        for batch in train:
            states = states_of(batch, planned=planned)
            states.backward(torch.ones_like(states))
            model.zero_grad()
        with torch.no_grad():
            for batch in held_out:
                states_of(batch, planned=planned)

    def model_calls() -> None:
        model.train()
        for batch in train:
            model(batch).loss.backward()
            model.zero_grad()
        model.eval()
        with torch.no_grad():
            for batch in held_out:
                model(batch)

    def training() -> None:
        state.progress.batches = 0
        trainer.train_epoch(stage, state, 0)

    def epoch() -> None:
        state.progress.best = -math.inf  # each epoch writes the best, as the first ones do
        training()
        store.save(trainer.training_state(stage, state))
        predictions = trainer.validate(stage, state)
        trainer.end_epoch(stage, state, folder, predictions, lambda metrics, step: None)

    return {
        "encoder": partial(encoder_calls, planned=False),
        "planned": partial(encoder_calls, planned=True),
        "model": model_calls,
        "training": training,
        "epoch": epoch,
    }


def time_in_turn(
    timed: dict[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return elapsed and processor milliseconds of each way and round."""
    passed: dict[str, list[float]] = {name: [] for name in timed}
    worked: dict[str, list[float]] = {name: [] for name in timed}
    for run in timed.values():  # once, unmeasured: imports and first allocations
        run()
    for _ in range(repeats):
        for name, run in timed.items():
            began, work = time.perf_counter(), time.process_time()
            run()
            worked[name].append(1000 * (time.process_time() - work))
            passed[name].append(1000 * (time.perf_counter() - began))
    return passed, worked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--patients", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "trajectory"
        folder.mkdir()
        timed = ways(arguments.patients, arguments.batch_size, folder)
        passed, worked = time_in_turn(timed, arguments.repeats)
        if arguments.profile:
            profile = cProfile.Profile()
            profile.runcall(timed["epoch"])
            pstats.Stats(profile).sort_stats("cumulative").print_stats(40)
    for name in timed:
        shown = [
            f"{what} {statistics.median(each[name]):6.0f} ms ({min(each[name]):.0f} to "
            f"{max(each[name]):.0f}), ratio {ratio(each, name)}"
            for what, each in (("elapsed", passed), ("processor", worked))
        ]
        sys.stdout.write(f"{name:9s} {'; '.join(shown)}\n")
    reached = statistics.median(ratios(passed, "epoch"))
    verdict = "reached" if reached <= TARGET else "MISSED"
    sys.stdout.write(
        f"epoch / encoder {reached:.3f}, at most {TARGET}: {verdict}\n"
        f"{machine('torch', threads=arguments.threads)}; medians (least to most) of "
        f"{arguments.repeats}\n"
    )


def ratios(times: dict[str, list[float]], name: str) -> list[float]:
    """Return a way's time over the encoder's in each round."""
    return [own / other for own, other in zip(times[name], times["encoder"], strict=True)]


def ratio(times: dict[str, list[float]], name: str) -> str:
    """Return the median over the rounds of a way's time over the encoder's, and its range."""
    each = ratios(times, name)
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


if __name__ == "__main__":
    main()
