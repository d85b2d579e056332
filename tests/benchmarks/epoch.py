"""What an epoch of stage 1 takes beside the calls of its encoder.

    python tests/benchmarks/epoch.py [--patients 3000] [--batch_size 16] [--threads 1] [--repeats 7]

Sample data, the program's defaults; ``--threads`` counts above batch 32, since up to there the
program takes one. In turn, so that a load on the machine meets all:

    encoder   forward and backward over the batches that train, forward alone over those that
              validate, nothing else: batches lie ready, each call plans for itself, the gradient of
              the states is made of ones
    planned   the same with plans that lie ready, too
    plans     the plans of all these batches made in a row; ``Loader`` makes up to 32 so
    model     as planned, with the head and its loss
    training  ``train_epoch`` as it is: batches made, gradients clipped, weights moved and averaged
    epoch     all of it: training, its state kept, validation, figures, winner and history written,
              each flushed to the disk
    watched   one more such epoch, with clocks around its encoder's calls
    inside    what these calls took in it: plans, forward, and of each backward pass what comes
              behind the gradient of the states; of the passes that train each eighth is timed and
              stands for eight, since clocks around all would make the epoch 2 % longer

Prints milliseconds an epoch that pass and of the processor, and the ratio to the encoder's in the
same round. The epoch shall take less than 1.3 times what its encoder's calls take, which can be
read in two ways, and both are judged, by the time that passes: ``inside``, what they take in the
very same epoch, which plans ahead; and ``encoder``, what they take as anyone makes them, one by
one. Beside them stand the ratios to ``planned`` and ``plans`` together and to ``planned`` alone.
``--profile`` prints where an epoch's time goes. With ``--give_back`` the C library gives freed
memory back to the system, as it does where the program does not tell it otherwise.
"""

import argparse
import contextlib
import cProfile
import logging
import math
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import machine

import medgemma_trainer as trainer

TARGET = 1.3
EACH = 8
"""Of the passes that train, how many one that is timed stands for."""


def ways(patients: int, batch_size: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """Give what is timed; ``patients`` train."""
    words = ["--trajectory_only", "--data_path", str(trainer.SAMPLE_DATA)]
    words += ["--max_samples", str(round(patients / 0.8)), "--batch_size", str(batch_size)]
    args = trainer.resolve(trainer.build_parser().parse_args(words))
    data = trainer.load_data(args)
    trainer.seed_everything(0)
    stage = trainer.trajectory_stage(args, data)
    assert isinstance(stage.model, trainer.TrajectoryClassifier)
    stage.patience = stage.epochs = 10**6
    learner, states = trainer.begin(stage, torch.device("cpu")), trainer.States(folder / "last")
    encoder, model = stage.model.encoder, stage.model
    train, held_out = list(stage.loaders["train"]), list(stage.loaders["val"])
    told = f"{len(data.split['train'])} patients train in {len(train)} batches of {args.batch_size}"
    sys.stdout.write(f"{told}, {len(data.split['val'])} validate in {len(held_out)}\n")

    def states_of(batch: trainer.PlannedBatch, *, ahead: bool) -> torch.Tensor:
        plan = batch["plan"] if ahead else None
        states: torch.Tensor = encoder(batch["times"], batch["values"], batch["observed"], plan)
        return states

    with torch.no_grad():
        for batch in [*train, *held_out]:
            if not torch.equal(states_of(batch, ahead=True), states_of(batch, ahead=False)):
                raise SystemExit("a plan made ahead gives other states: nothing to compare")

    def encoder_calls(*, ahead: bool) -> None:
        encoder.train()
        for batch in train:
            states = states_of(batch, ahead=ahead)
            states.backward(torch.ones_like(states))
            encoder.zero_grad()
        encoder.eval()
        with torch.no_grad():
            for batch in held_out:
                states_of(batch, ahead=ahead)

    def plans() -> None:
        for batch in [*train, *held_out]:
            encoder.plan(batch["times"], batch["values"], batch["observed"])

    def model_calls() -> None:
        model.train()
        for batch in train:
            model(batch).loss.backward()
            model.zero_grad()
        model.eval()
        with torch.no_grad():
            for batch in held_out:
                model(batch)

    def training() -> float:
        learner.progress.batches = 0
        return trainer.train_epoch(stage, learner)

    def epoch() -> None:
        learner.stopping.best = -math.inf  # each epoch writes the winner, as the first ones do
        loss = training()
        states.keep(trainer.state_of(stage, learner))
        with learner.vectors.lent(learner.average.shadow):
            scored = trainer.evaluate(model, stage.loaders["val"], torch.device("cpu"))
        trainer.end_epoch(stage, learner, folder, loss, scored, lambda figures, step: None)

    def watched() -> float:
        with clocks(encoder) as spent:
            epoch()
        return spent()

    return {
        "encoder": partial(encoder_calls, ahead=False),
        "planned": partial(encoder_calls, ahead=True),
        "plans": plans,
        "model": model_calls,
        "training": training,
        "epoch": epoch,
        "watched": watched,
    }


@contextlib.contextmanager
def clocks(encoder: trainer.ClinicalODERNN) -> Iterator[Callable[[], float]]:
    """Time an encoder's calls; gives what tells their seconds."""
    forward, plan, backward = encoder.forward, encoder.plan, Tensor.backward
    whole, timed = [0.0], [0.0]  # plans and validation; training's passes that are timed
    count, behind = 0, 0.0

    def clocked(spent: list[float], work: Callable[..., Any], *given: Any) -> Any:
        began = time.perf_counter()
        result = work(*given)
        spent.append(time.perf_counter() - began)
        return result

    def mark(_: Tensor) -> None:
        nonlocal behind
        behind = time.perf_counter()

    def run(*given: Any) -> Any:
        nonlocal count
        if not torch.is_grad_enabled():
            return clocked(whole, forward, *given)
        count += 1
        if count % EACH:
            return forward(*given)
        states = clocked(timed, forward, *given)
        states.register_hook(mark)
        return states

    def go_back(loss: Tensor) -> None:
        backward(loss)
        if count % EACH == 0:
            timed.append(time.perf_counter() - behind)

    with (
        mock.patch.object(encoder, "forward", run),
        mock.patch.object(encoder, "plan", partial(clocked, whole, plan)),
        mock.patch.object(Tensor, "backward", go_back),
    ):
        yield lambda: sum(whole) + sum(timed) * count / (count // EACH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--patients", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--give_back", action="store_true")
    arguments = parser.parse_args()
    small = arguments.batch_size <= trainer.MOST_ALONE  # then the program takes one thread
    torch.set_num_threads(1 if small else arguments.threads)
    if not arguments.give_back:
        trainer.keep_freed_memory()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "trajectory"
        folder.mkdir()
        timed = ways(arguments.patients, arguments.batch_size, folder)
        for run in timed.values():  # once, unmeasured: imports and first allocations
            run()
        passed: dict[str, list[float]] = {name: [] for name in (*timed, "inside")}
        worked: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(arguments.repeats):
            for name, run in timed.items():
                began, work = time.perf_counter(), time.process_time()
                spent = run()
                worked[name].append(1000 * (time.process_time() - work))
                passed[name].append(1000 * (time.perf_counter() - began))
                if name == "watched":
                    passed["inside"].append(1000 * spent)
        if arguments.profile:
            profile = cProfile.Profile()
            profile.runcall(timed["epoch"])
            pstats.Stats(profile).sort_stats("cumulative").print_stats(40)
    for name in passed:
        told = [
            f"{what} {statistics.median(each[name]):6.0f} ms ({min(each[name]):.0f} to "
            f"{max(each[name]):.0f}), ratio {ratio(each, name)}"
            for what, each in (("passed", passed), ("processor", worked))
            if name in each
        ]
        sys.stdout.write(f"{name:9s} {'; '.join(told)}\n")
    passed["both"] = [sum(each) for each in zip(passed["planned"], passed["plans"], strict=True)]
    itself, both, calls = (
        statistics.median(ratios(passed, "epoch", of)) for of in ("encoder", "both", "planned")
    )
    inside = statistics.median(ratios(passed, "watched", "inside"))
    for name, reached in (("inside", inside), ("encoder", itself)):
        verdict = "reached" if reached < TARGET else "MISSED"
        sys.stdout.write(f"epoch / {name} {reached:.3f}, to be below {TARGET}: {verdict}\n")
    sys.stdout.write(f"epoch / (planned + plans) {both:.3f}, epoch / planned {calls:.3f}\n")
    sys.stdout.write(
        f"{machine('torch', threads=torch.get_num_threads())}; medians (least to most) of "
        f"{arguments.repeats}\n"
    )


def ratios(times: dict[str, list[float]], name: str, of: str) -> list[float]:
    """Give one way's time by another's in each round."""
    return [own / other for own, other in zip(times[name], times[of], strict=True)]


def ratio(times: dict[str, list[float]], name: str) -> str:
    """Give the median over the rounds of a way's time by the encoder's."""
    each = ratios(times, name, "encoder")
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


if __name__ == "__main__":
    main()
