"""Compare an epoch of stage 1 with the calls of its encoder alone.

    python tests/benchmarks/epoch.py [--patients 3000] [--batch_size 16] [--threads 1] [--repeats 7]

Sample data, the program's defaults. The ways run in turn, so that other work meets all of them:

    encoder   forward and backward over the training batches, forward alone over the validation
              batches; the batches are ready, each call plans for itself, the gradient of the states
              is made of ones
    model     the same with plans that are ready too, and with the head and its loss
    training  ``train_epoch``: batches made, gradients clipped, weights moved and averaged
    epoch     training, its checkpoint, validation, best weights and history, written to the disk

Prints processor milliseconds of an epoch and their ratio to the encoder's in the same round.
"""

import argparse
import logging
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import SAMPLE, machine, spread, stage_maker, write

import medgemma_trainer as trainer
from medgemma_clinical.training.state import StateStore


def ways(patients, batch_size, folder):
    """Return what is timed; ``patients`` train."""
    words = ["--trajectory_only", "--data_path", SAMPLE, "--batch_size", batch_size]
    stage = stage_maker(*words, "--max_samples", round(patients / 0.8))[2]()
    stage.patience = stage.epochs = 10**6
    state, store = trainer.set_up(stage), StateStore(folder / "last")
    model = stage.model
    train, held_out = ([*map(stage.collate, stage.batches[part])] for part in ("train", "val"))

    def states_of(batch):
        series = batch["times"], batch["values"], batch["observed"]
        return model.encoder(*series, batch["prediction_hours"])

    def encoder():
        for batch in train:
            states = states_of(batch)
            states.backward(torch.ones_like(states))
            model.zero_grad()
        with torch.no_grad():
            for batch in held_out:
                states_of(batch)

    def whole_model():
        model.train()
        for batch in train:
            model(batch).loss.backward()
            model.zero_grad()
        model.eval()
        with torch.no_grad():
            for batch in held_out:
                model(batch)

    def training():
        state.progress.batches = 0
        trainer.train_epoch(stage, state, 0)

    def epoch():
        state.progress.best = -math.inf  # each epoch writes the best, as the first ones do
        training()
        store.save(trainer.training_state(stage, state))
        predictions = trainer.validate(stage, state)
        trainer.end_epoch(stage, state, folder, predictions, lambda metrics, step: None)

    return {"encoder": encoder, "model": whole_model, "training": training, "epoch": epoch}


def time_in_turn(timed, repeats):
    """Return processor milliseconds of each way and round."""
    took = {name: [] for name in timed}
    for turn in range(repeats + 1):
        for name, run in timed.items():
            began = time.process_time()
            run()
            if turn:  # the first one warms up
                took[name].append(1000 * (time.process_time() - began))
    return took


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--patients", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "trajectory"
        folder.mkdir()
        took = time_in_turn(
            ways(arguments.patients, arguments.batch_size, folder), arguments.repeats
        )
    logging.disable(logging.NOTSET)
    for name, each in took.items():
        ratios = [own / base for own, base in zip(each, took["encoder"], strict=True)]
        write(f"{name:9} {spread(each, 0)} ms, {spread(ratios, 2)} times the encoder")
    write(
        f"{arguments.patients} patients, batch {arguments.batch_size}; "
        f"{machine('torch', threads=arguments.threads)}; median (minimum to maximum) of "
        f"{arguments.repeats}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
