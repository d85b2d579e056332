"""Time the encoder against the same network solved in other ways.

    python tests/benchmarks/encoder.py [--batch_sizes 16 256] [--repeats 7] [--threads 1] [--seed 0]

Forward and backward over patients of the sample data, each way in turn:

    project             ClinicalODERNN as it is, the whole batch at once
    plain path          the same steps with the fast path switched off: autograd records each
    patient by patient  the same weights, torchdiffeq's dopri5 (rtol 1e-3, atol 1e-4), one patient
                        per call, one odeint per gap
    torchdiffeq rk4     the same weights, the whole batch, each row its own gap, odeint's rk4
    nn.GRU              torch's GRU of the same width on the same padded inputs: no equation

A batch is checked and planned ahead, as the loader of stage 1 does. All ways but nn.GRU must give
the same states and gradients before anything is timed. Times are those of the processor.
"""

import argparse
import copy
import statistics
import sys
import time

import numpy as np
import torch
import torchdiffeq
from common import SAMPLE, machine, spread, write
from torch import nn

from dataset_format import MIMICtrajectoryDataset
from dte_encoder import MAX_SCALED_STEP, ClinicalODERNN

FAST_RUNS = 10
"""Timings of a fast way for each one of the slow way: they are short, hence noisy."""

SAME, SAME_PATH = 1e-3, 1e-5
"""Allowed difference of states, and of gradients as a share of the largest entry; of gradients on
the plain path, which takes the same steps."""

PROJECT, PLAIN, SLOW, GRU = "project", "plain path", "patient by patient", "nn.GRU"


class TorchdiffeqRK4(ClinicalODERNN):
    """The same network with odeint's own rk4, the batch solved as one, each row its own gap.

    Made with any solver name of torchdiffeq, which this class replaces.
    """

    def advance(self, state, dt):
        scale = dt.unsqueeze(1)
        step = 1 / max(1.0, float(torch.ceil(dt.max() / MAX_SCALED_STEP)))
        return torchdiffeq.odeint(
            lambda _, h: scale * self.field(h),
            state,
            state.new_tensor([0.0, 1.0]),
            method="rk4",
            options={"step_size": step},
        )[1]


class PlainGRU(nn.Module):
    """torch's GRU over the encoder's own padded inputs."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)  # its gradients are its own
        width = self.encoder.read.out_features
        self.gru = nn.GRU(width, encoder.hidden_dim, batch_first=True)

    def plan(self, times, values, observed):
        return self.encoder.plan(times, values, observed)

    def run(self, plan):
        read = self.encoder.read(self.encoder.inputs(plan)).relu()
        patients, length = plan.shape
        padded = read.new_zeros(patients * length, read.shape[1])
        padded = padded.index_copy(0, plan.observation_index, read)
        return self.gru(padded.view(patients, length, -1))[0]


def together(encoder, batch, weight):
    """Return a forward and backward over the padded batch, which returns the states."""
    plan = encoder.plan(*batch)

    def run():
        states = encoder.run(plan)
        states.backward(weight)
        return states.detach()

    return run


def one_by_one(encoder, batch, weight):
    """Return the same patient by patient, the states as one padded tensor."""
    lengths = batch[2].any(dim=2).sum(1).tolist()
    patients = [
        together(encoder, [x[i : i + 1, :length] for x in batch], weight[i : i + 1, :length])
        for i, length in enumerate(lengths)
    ]

    def run():
        states = torch.zeros_like(weight)
        for i, (patient, length) in enumerate(zip(patients, lengths, strict=True)):
            states[i, :length] = patient()[0]
        return states

    return run


def milliseconds(run, module):
    """Return the processor time of all threads; gradients start empty."""
    module.zero_grad()
    began = time.process_time()
    run()
    return 1000 * (time.process_time() - began)


def load_batch(size, seed):
    """Draw ``size`` patients; return an encoder with their normaliser, and the batch."""
    dataset = MIMICtrajectoryDataset(SAMPLE)
    chosen = np.random.default_rng(seed).choice(len(dataset), size=size, replace=False)
    padded = dataset.collate(chosen.tolist())
    batch = padded["times"], padded["values"], padded["observed"]
    torch.manual_seed(seed)
    encoder = ClinicalODERNN(1, time_scale=dataset.time_scale)
    encoder.fit_normalizer(batch[1], batch[2])
    return encoder, batch


def all_ways(encoder):
    """Return the module of each row of the table, all with the weights of ``encoder``."""
    plain, adaptive = copy.deepcopy(encoder), {"time_scale": encoder.time_scale, "solver": "dopri5"}
    plain.fused = False
    modules = {PROJECT: encoder, PLAIN: plain, SLOW: ClinicalODERNN(1, **adaptive)}
    modules["torchdiffeq rk4"] = TorchdiffeqRK4(1, **adaptive)
    for module in modules.values():
        module.load_state_dict(encoder.state_dict())
    return {**modules, GRU: PlainGRU(encoder)}


def check_same(modules, states):
    """Compare states and gradients of all ways with the project's."""
    gradients = {
        name: {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
        for name, module in modules.items()
    }
    expected = gradients[PROJECT]
    for name in modules.keys() - {PROJECT, GRU}:
        found = gradients[name]
        assert found.keys() == expected.keys()
        apart = float((states[name] - states[PROJECT]).abs().max())
        share = max(
            float((found[key] - each).abs().max() / each.abs().max())
            for key, each in expected.items()
        )
        if apart > SAME or share > (SAME_PATH if name == PLAIN else SAME):
            raise SystemExit(f"{name}: states differ by {apart:.1e}, gradients by {share:.1e}")


def compare(size, repeats, seed):
    """Check that all ways agree, time them in turn, and return a line for each."""
    encoder, batch = load_batch(size, seed)
    weight = torch.randn(*batch[0].shape, encoder.hidden_dim)
    weight[~batch[2].any(dim=2)] = 0.0  # nn.GRU has states in padding
    modules = all_ways(encoder)
    work = {
        name: (one_by_one if name == SLOW else together)(module, batch, weight)
        for name, module in modules.items()
    }
    check_same(modules, {name: run() for name, run in work.items()})  # also warms up
    took = {name: [] for name in modules}
    for _ in range(repeats):
        for name in modules:
            runs = 1 if name == SLOW else FAST_RUNS
            took[name] += [milliseconds(work[name], modules[name]) for _ in range(runs)]
    base = statistics.median(took[PROJECT])
    lengths = batch[2].any(dim=2).sum(1)
    lines = [f"\nbatch {size}, {int(lengths.min())} to {int(lengths.max())} observations"]
    for name, each in took.items():
        lines.append(
            f"{name:20} {spread(each):>32} ms, {statistics.median(each) / size:.3f} ms per patient"
            f", {statistics.median(each) / base:.3g} times the project"
        )
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--repeats", type=int, default=7, help="timings of the slow way (7)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="draws patients and weights (0)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    for size in arguments.batch_sizes:
        write("\n".join(compare(size, arguments.repeats, arguments.seed)))
    write(
        f"\n{machine('torch', 'torchdiffeq', threads=arguments.threads)}; median (minimum to "
        f"maximum) of {arguments.repeats}, {FAST_RUNS} times as many of the fast ways"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
