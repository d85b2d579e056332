"""Time the encoder against the same network solved in other ways, and count what it keeps.

Usage:
    python tests/benchmarks/encoder.py [--repeats 7] [--threads 2] [--seed 0]

Forward and backward over patients of the sample data, every way in turn, so that a load on the
machine meets all of them. The ways:

    project             ClinicalODERNN as it is, the whole batch at once
    and its plan        the same, and the batch is checked and planned in the same call
    plain autograd      the same steps and layers, recorded by autograd one by one
    patient by patient  the same weights, torchdiffeq dopri5 (rtol 1e-3, atol 1e-4), one patient a
                        call, one odeint a gap; what the project is compared with
    and their plans     the same, and each patient is checked and planned in his call
    torchdiffeq rk4     the same weights, the whole batch, each row its own gap, odeint's rk4
    torchode dopri5     the same weights, the whole batch, each row its own interval and steps, at
                        the tolerance of patient by patient; left out where torchode is missing
    nn.GRU              torch's GRU of the same width on the same padded inputs: no equation

The batch is checked and planned ahead, as stage 1's loader does it. In the rows "and its plan" and
"and their plans" that is done within the timed call: these two are compared with each other. All
but the last must give the same states and the same gradients before anything is timed. Then the
project alone on made-up patients: milliseconds with 1, 9 and 36 features and 10, 20 and 70
observations each, and the bytes that a pass keeps for its derivative, with more patients and with
more observations.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchdiffeq

try:
    import torchode
except ImportError:
    torchode = None
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import machine  # noqa: E402

from dataset_format import MIMICtrajectoryDataset  # noqa: E402
from dte_encoder import (  # noqa: E402
    MAX_SCALED_STEP,
    ClinicalODERNN,
    Plan,
    keep_freed_memory,
)

DATA = ROOT / "tests" / "data" / "physionet2012_bicarbonate.csv"
TARGETS = {16: 80.0, 256: 250.0}
"""Batch size, and how many times faster than patient by patient the project shall be."""

OTHER_TARGETS = {"torchdiffeq rk4": 3.0, "torchode dopri5": 1.0, "nn.GRU": 1 / 6}
"""How many times the project's time these shall take at least."""

RTOL, ATOL = 1e-3, 1e-4

FAST_RUNS = 10
"""Timings of a fast way for each one of the slow way: they are short, hence noisy."""

SAME_STATES = 1e-3
"""Two solves of the same network may differ by this in a layer-normalised state."""

SAME_GRADIENTS = {"plain autograd": 1e-5}
"""Share of a gradient's largest entry by which ways may differ; the others, which take other steps,
by ``SAME_STATES``."""

FEATURES, OBSERVATIONS, MADE_UP_PATIENTS = (1, 9, 36), (10, 20, 70), 64
PATIENTS = (16, 64, 256)

PLANNED_IN_THE_CALL = "and its plan", "and their plans"
SLOW = "patient by patient", PLANNED_IN_THE_CALL[1]

Batch = tuple[Tensor, ...]
Work = Callable[[], Tensor]
Encoder = Any  # a module with ``plan``; torch's call takes and gives anything


class TorchdiffeqRK4(ClinicalODERNN):
    """The same network with odeint's own rk4, the batch solved as one, each row its own gap.

    Made with any solver of torchdiffeq, whose call is then this one.
    """

    def _odeint(self, state: Tensor, span: Tensor) -> Tensor:
        scale = span.unsqueeze(1)
        step = 1 / max(1.0, float(torch.ceil(span.max() / MAX_SCALED_STEP)))
        trajectory: Tensor = torchdiffeq.odeint(
            lambda _, h: scale * self.field(h),
            state,
            state.new_tensor([0.0, 1.0]),
            method="rk4",
            options={"step_size": step},
        )
        return trajectory[1]


class Torchode(ClinicalODERNN):
    """The same network with torchode's dopri5: each row has its own interval and its own steps.

    Made with any solver of torchdiffeq, whose call is then this one.
    """

    def _odeint(self, state: Tensor, span: Tensor) -> Tensor:
        term = torchode.ODETerm(lambda _, h: self.field(h))
        controller = torchode.IntegralController(atol=ATOL, rtol=RTOL, term=term)
        solver = torchode.AutoDiffAdjoint(
            torchode.Dopri5(term=term), controller, backprop_through_step_size_control=False
        )
        problem = torchode.InitialValueProblem(y0=state, t_start=torch.zeros_like(span), t_end=span)
        result: Tensor = solver.solve(problem).ys[:, -1]
        return result


class Plain(ClinicalODERNN):
    """The same network and the same steps; autograd records each."""

    def _run(self, read: Tensor, plan: Plan) -> Tensor:
        return self._run_plainly(read, plan, self.field.rk4())


class PlainGRU(nn.Module):
    """torch's GRU over the encoder's own padded inputs."""

    def __init__(self, encoder: ClinicalODERNN) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)  # its gradients are its own
        self.gru = nn.GRU(encoder.update.input_size, encoder.hidden_dim, batch_first=True)

    def plan(self, times: Tensor, values: Tensor, observed: Tensor) -> Plan:
        return self.encoder.plan(times, values, observed)

    def forward(self, times: Tensor, values: Tensor, observed: Tensor, plan: Plan) -> Tensor:
        read = self.encoder.read(self.encoder.inputs(values, plan)).relu()
        padded = read.new_zeros(times.numel(), read.shape[1]).index_copy(0, plan.places, read)
        states: Tensor = self.gru(padded.view(*times.shape, -1))[0]
        return states


def together(encoder: Encoder, batch: Batch, weight: Tensor, *, ahead: bool = True) -> Work:
    """Give a forward and backward over the padded batch, which gives the states."""
    plan = encoder.plan(*batch) if ahead else None

    def run() -> Tensor:
        states: Tensor = encoder(*batch, plan)
        states.backward(weight)
        return states.detach()

    return run


def one_by_one(encoder: Encoder, batch: Batch, weight: Tensor, *, ahead: bool = True) -> Work:
    """Give the same patient by patient, the states as one padded tensor."""
    lengths = batch[2].any(dim=2).sum(1).tolist()
    patients = [
        together(
            encoder,
            tuple(tensor[i : i + 1, :length] for tensor in batch),
            weight[i : i + 1, :length],
            ahead=ahead,
        )
        for i, length in enumerate(lengths)
    ]

    def run() -> Tensor:
        states = torch.zeros_like(weight)
        for i, (patient, length) in enumerate(zip(patients, lengths, strict=True)):
            states[i, :length] = patient()[0]
        return states

    return run


def seconds(run: Work, module: nn.Module) -> tuple[float, float]:
    """Give the time that passes and the processors' time, of all threads; gradients begin empty."""
    module.zero_grad()
    start, worked = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - worked


def load_batch(size: int, seed: int) -> tuple[ClinicalODERNN, Batch]:
    """Draw ``size`` patients; give them with an encoder whose normaliser knows them."""
    dataset = MIMICtrajectoryDataset(DATA)
    chosen = np.random.default_rng(seed).choice(len(dataset), size=size, replace=False)
    padded = dataset.collate(chosen.tolist())
    batch = padded["times"], padded["values"], padded["observed"]
    torch.manual_seed(seed)
    encoder = ClinicalODERNN(1, time_scale=dataset.time_scale)
    encoder.fit_normalizer(batch[1], batch[2])
    return encoder, batch


def with_weights_of(encoder: ClinicalODERNN, twin: ClinicalODERNN) -> ClinicalODERNN:
    twin.load_state_dict(encoder.state_dict())
    return twin


def all_ways(encoder: ClinicalODERNN) -> dict[str, Encoder]:
    """Give the module behind each way, all with the weights of ``encoder``."""
    scale = encoder.time_scale
    ways: dict[str, Encoder] = {
        "project": encoder,
        "and its plan": copy.deepcopy(encoder),
        "plain autograd": with_weights_of(encoder, Plain(1, time_scale=scale)),
        **{
            way: with_weights_of(
                encoder, ClinicalODERNN(1, time_scale=scale, solver="dopri5", rtol=RTOL, atol=ATOL)
            )
            for way in SLOW
        },
        "torchdiffeq rk4": with_weights_of(
            encoder, TorchdiffeqRK4(1, time_scale=scale, solver="midpoint")
        ),
    }
    if torchode is not None:
        ways["torchode dopri5"] = with_weights_of(
            encoder, Torchode(1, time_scale=scale, solver="midpoint")
        )
    return {**ways, "nn.GRU": PlainGRU(encoder)}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def check_same(ways: dict[str, nn.Module], states: dict[str, Tensor]) -> list[str]:
    """Compare states and gradients of all ways with the project's; give a line about each."""
    lines = []
    expected = gradients(ways["project"])
    for way, module in ways.items():
        if way in ("project", "nn.GRU"):
            continue
        found = gradients(module)
        assert found.keys() == expected.keys()
        difference = float((states[way] - states["project"]).abs().max())
        share = max(
            float((found[name] - expected[name]).abs().max() / expected[name].abs().max())
            for name in expected
        )
        lines.append(f"{way:20}states within {difference:.1e}, gradients within {share:.1e}")
        if difference > SAME_STATES or share > SAME_GRADIENTS.get(way, SAME_STATES):
            raise SystemExit(f"not the same work, nothing to compare: {lines[-1]}")
    return lines


def measure(size: int, repeats: int, seed: int) -> list[str]:
    """Check that all ways agree, time them in turn, and give the lines of the report."""
    encoder, batch = load_batch(size, seed)
    weight = torch.randn(*batch[0].shape, encoder.hidden_dim)
    weight[~batch[2].any(dim=2)] = 0.0  # nn.GRU has states in padding
    modules = all_ways(encoder)

    work = {
        way: (one_by_one if way in SLOW else together)(
            module, batch, weight, ahead=way not in PLANNED_IN_THE_CALL
        )
        for way, module in modules.items()
    }
    states = {way: run() for way, run in work.items()}  # also warms up
    same = check_same(modules, states)
    took: dict[str, list[tuple[float, float]]] = {way: [] for way in modules}
    for _ in range(repeats):
        for way in modules:
            runs = 1 if way in SLOW else FAST_RUNS
            took[way] += [seconds(work[way], modules[way]) for _ in range(runs)]
    lengths = batch[2].any(dim=2).sum(1)
    head = (
        f"\nbatch {size}: {int(lengths.sum())} observations, {int(lengths.min())} to "
        f"{int(lengths.max())} a patient"
    )
    return [head, *same, *table(took, size)]


def table(took: dict[str, list[tuple[float, float]]], size: int) -> list[str]:
    """Lay out medians, quartiles, milliseconds a patient and ratios.

    Beside other processes the time that passes is a short pass and now and then a turn of theirs;
    the processor's time, with one thread, is the work alone.
    """
    median = {name: statistics.median(wall for wall, _ in values) for name, values in took.items()}
    worked = {name: statistics.median(cpu for _, cpu in values) for name, values in took.items()}
    lines = [
        f"{'':20}{'median ms':>10}{'quartiles':>18}{'ms a patient':>14}{'times project':>15}"
        f"{'processor ms':>14}{'times project':>15}"
    ]
    for name, values in took.items():
        low, high = np.quantile([wall for wall, _ in values], [0.25, 0.75]) * 1e3
        lines.append(
            f"{name:20}{median[name] * 1e3:10.1f}{f'{low:.1f} - {high:.1f}':>18}"
            f"{median[name] * 1e3 / size:14.3f}{median[name] / median['project']:15.2f}"
            f"{worked[name] * 1e3:14.1f}{worked[name] / worked['project']:15.2f}"
        )
    for name, target in {"patient by patient": TARGETS[size], **OTHER_TARGETS}.items():
        if name in median:
            ratio = median[name] / median["project"]
            verdict = "reached" if ratio >= target else "MISSED"
            lines.append(
                f"{name} takes {ratio:.3g} times as long; at least {target:.3g}: {verdict}"
            )
    own, theirs = PLANNED_IN_THE_CALL
    lines.append(
        f"both planned in the call: patient by patient takes {median[theirs] / median[own]:.3g} "
        f"times as long, {worked[theirs] / worked[own]:.3g} by the processor's time"
    )
    if torchode is None:
        lines.append("torchode is not installed: left out")
    return lines


def made_up(
    features: int, observations: int, seed: int, patients: int = MADE_UP_PATIENTS
) -> tuple[Work, ClinicalODERNN]:
    """Give a pass over patients of so many observations, half of the values measured."""
    generator = torch.Generator().manual_seed(seed)
    shape = (patients, observations)
    gaps = torch.empty(shape).exponential_(1 / 4, generator=generator)  # 4 hours on average
    values = torch.randn((*shape, features), generator=generator)
    observed = torch.rand((*shape, features), generator=generator) < 0.5
    observed[..., 0] |= ~observed.any(dim=2)
    torch.manual_seed(seed)
    encoder = ClinicalODERNN(features)
    weight = torch.randn(*shape, encoder.hidden_dim, generator=generator)
    return together(encoder, (gaps.cumsum(1), values, observed), weight), encoder


def shapes(repeats: int, seed: int) -> list[str]:
    """Time every number of features beside the others; give the lines of the report."""
    lines = [
        f"\nms a patient, {MADE_UP_PATIENTS} made-up patients a batch",
        f"{'observations':14}" + "".join(f"{f'{features} features':>16}" for features in FEATURES),
    ]
    for observations in OBSERVATIONS:
        ways = {features: made_up(features, observations, seed) for features in FEATURES}
        took: dict[int, list[float]] = {features: [] for features in FEATURES}
        for turn in range(1 + repeats * FAST_RUNS):
            for features, way in ways.items():
                passed, _ = seconds(*way)
                if turn:  # the first warms up
                    took[features].append(passed)
        median = {features: statistics.median(times) for features, times in took.items()}
        cells = (
            f"{1e3 * median[features] / MADE_UP_PATIENTS:.3f} ({median[features] / median[1]:.2f})"
            for features in FEATURES
        )
        lines.append(f"{observations:<14}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def kept_bytes(run: Work) -> int:
    """Count what autograd holds at the end of the forward part of a pass, weights included."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(seen.values())


def memory(seed: int) -> list[str]:
    """Count what a pass keeps for more patients and more observations; give the lines."""
    lines = [
        "\nbytes kept for the derivative, a patient and observation (of which: fewest = 1)",
        f"{'observations':14}" + "".join(f"{f'{patients} patients':>16}" for patients in PATIENTS),
    ]
    each = {
        (observations, patients): kept_bytes(made_up(1, observations, seed, patients)[0])
        / (observations * patients)
        for observations in OBSERVATIONS
        for patients in PATIENTS
    }
    fewest = min(each.values())
    for observations in OBSERVATIONS:
        row = [each[observations, patients] for patients in PATIENTS]
        cells = (f"{size:.0f} ({size / fewest:.2f})" for size in row)
        lines.append(f"{observations:<14}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the encoder on the sample data.")
    parser.add_argument("--repeats", type=positive, default=7, help="timings of the slow way (7)")
    parser.add_argument("--threads", type=positive, default=2, help="torch threads (2)")
    parser.add_argument("--seed", type=int, default=0, help="draws patients and weights (0)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the program does: all ways share it
    lines = [
        machine("torch", "torchdiffeq", "torchode", threads=torch.get_num_threads()),
        f"forward + backward, float32, hidden {ClinicalODERNN(1).hidden_dim}, seed {args.seed}, "
        f"{args.repeats} repeats ({FAST_RUNS} times as many of the fast ways)",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    for size in TARGETS:
        sys.stdout.write("\n".join(measure(size, args.repeats, args.seed)) + "\n")
        sys.stdout.flush()
    sys.stdout.write("\n".join([*shapes(args.repeats, args.seed), *memory(args.seed)]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
