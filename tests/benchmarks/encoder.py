"""Time the encoder against the same network solved in other ways, and count its kept memory.

Usage:
    python tests/benchmarks/encoder.py [--repeats 7] [--threads 2] [--seed 0]

Forward and backward over patients of the sample data, each solver in turn, so that a load on the
machine meets all of them:

    project             ClinicalODERNN as it is, the whole batch at once
    and its plan        the same, and the batch is checked and planned in the same call
    plain path          the same steps with the fast path switched off: autograd records each
    patient by patient  the same weights, torchdiffeq dopri5 (rtol 1e-3, atol 1e-4), one patient a
                        call, one odeint a gap; the reference for the project's aims
    and their plans     the same, and each patient is checked and planned in the same call
    torchdiffeq rk4     the same weights, the whole batch, each row its own gap, odeint's rk4
    torchode dopri5     the same weights, the whole batch, each row its own interval and steps, at
                        the tolerance of patient by patient; left out if torchode is missing
    nn.GRU              torch's GRU of the same width on the same padded inputs: no equation

The batch is checked and planned ahead, as the loader of stage 1 does; the rows "and its plan" and
"and their plans" do so within the timed call and are compared with each other. All but nn.GRU must
give the same states and the same gradients before anything is timed. Then the project alone on
simulated patients: milliseconds with 1, 9 and 36 features and 10, 20 and 70 observations each, and
the bytes that a pass keeps for its derivative, with more patients and with more observations.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchdiffeq

try:
    import torchode
except ImportError:
    torchode = None
from common import ROOT, SAMPLE, machine
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))

from dataset_format import MIMICtrajectoryDataset
from dte_encoder import MAX_SCALED_STEP, ClinicalODERNN
from medgemma_clinical.models.encoder_plan import Plan

AIMS = {16: 80.0, 256: 250.0}
"""Batch size, and how many times faster than patient by patient the project must be."""

OTHER_AIMS = {"torchdiffeq rk4": 1.0, "torchode dopri5": 1.0, "nn.GRU": 1 / 1.5}
"""How many times the project's time the others must take at least."""

RTOL, ATOL = 1e-3, 1e-4

FAST_RUNS = 10
"""Timings of a fast solver for each one of a slow solver: they are short, hence noisy."""

SAME_STATES = 1e-3
"""Two solutions of the same network may differ by this in a layer-normalised state."""

SAME_GRADIENTS = {"plain path": 1e-5}
"""Allowed difference as a share of a gradient's largest entry; of the others, which take other
steps, ``SAME_STATES``."""

FEATURES, OBSERVATIONS, SIMULATED_PATIENTS = (1, 9, 36), (10, 20, 70), 64
PATIENTS = (16, 64, 256)

PLANNED_IN_THE_CALL = "and its plan", "and their plans"
SLOW = "patient by patient", PLANNED_IN_THE_CALL[1]

Batch = tuple[Tensor, ...]
Work = Callable[[], Tensor]
Timings = dict[str, list[tuple[float, float]]]


class TorchdiffeqRK4(ClinicalODERNN):
    """The same network with odeint's own rk4, the batch solved as one, each row its own gap.

    Made with any solver name of torchdiffeq, which this class replaces.
    """

    def advance(self, state: Tensor, dt: Tensor) -> Tensor:
        scale = dt.unsqueeze(1)
        step = 1 / max(1.0, float(torch.ceil(dt.max() / MAX_SCALED_STEP)))
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

    Made with any solver name of torchdiffeq, which this class replaces.
    """

    def advance(self, state: Tensor, dt: Tensor) -> Tensor:
        term = torchode.ODETerm(lambda _, h: self.field(h))
        controller = torchode.IntegralController(atol=ATOL, rtol=RTOL, term=term)
        solver = torchode.AutoDiffAdjoint(
            torchode.Dopri5(term=term), controller, backprop_through_step_size_control=False
        )
        problem = torchode.InitialValueProblem(y0=state, t_start=torch.zeros_like(dt), t_end=dt)
        result: Tensor = solver.solve(problem).ys[:, -1]
        return result


class PlainGRU(nn.Module):
    """torch's GRU over the encoder's own padded inputs."""

    def __init__(self, encoder: ClinicalODERNN) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)  # its gradients are its own
        width: int = self.encoder.read.out_features
        self.gru = nn.GRU(width, encoder.hidden_dim, batch_first=True)

    def plan(self, times: Tensor, values: Tensor, observed: Tensor) -> Plan:
        return self.encoder.plan(times, values, observed)

    def run(self, plan: Plan) -> Tensor:
        read = self.encoder.read(self.encoder.inputs(plan)).relu()
        patients, length = plan.shape
        padded = read.new_zeros(patients * length, read.shape[1])
        padded = padded.index_copy(0, plan.observation_index, read)
        states: Tensor = self.gru(padded.view(patients, length, -1))[0]
        return states


def together(encoder: Any, batch: Batch, weight: Tensor, *, ahead: bool = True) -> Work:
    """Return a forward and backward over the padded batch, which returns the states."""
    plan = encoder.plan(*batch) if ahead else None

    def run() -> Tensor:
        states: Tensor = encoder.run(plan) if ahead else encoder(*batch)
        states.backward(weight)
        return states.detach()

    return run


def one_by_one(encoder: Any, batch: Batch, weight: Tensor, *, ahead: bool = True) -> Work:
    """Return the same patient by patient, the states as one padded tensor."""
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
    """Return wall time and processor time of all threads; gradients begin empty."""
    module.zero_grad()
    start, worked = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - worked


def load_batch(size: int, seed: int) -> tuple[ClinicalODERNN, Batch]:
    """Draw ``size`` patients; return an encoder with their normaliser, and the batch."""
    dataset = MIMICtrajectoryDataset(SAMPLE)
    chosen = np.random.default_rng(seed).choice(len(dataset), size=size, replace=False)
    padded = dataset.collate(chosen.tolist())
    batch = padded["times"], padded["values"], padded["observed"]
    torch.manual_seed(seed)
    encoder = ClinicalODERNN(1, time_scale=dataset.time_scale)
    encoder.fit_normalizer(batch[1], batch[2])
    return encoder, batch


def all_solvers(encoder: ClinicalODERNN) -> dict[str, nn.Module]:
    """Return the module behind each row of the table, all with the weights of ``encoder``."""
    torchdiffeq_solver = {"time_scale": encoder.time_scale, "solver": "dopri5"}
    plain = copy.deepcopy(encoder)
    plain.fused = False
    modules: dict[str, nn.Module] = {
        "project": encoder,
        "and its plan": copy.deepcopy(encoder),
        "plain path": plain,
        **{
            name: ClinicalODERNN(1, rtol=RTOL, atol=ATOL, **torchdiffeq_solver)  # type: ignore[arg-type]
            for name in SLOW
        },
        "torchdiffeq rk4": TorchdiffeqRK4(1, **torchdiffeq_solver),  # type: ignore[arg-type]
    }
    if torchode is not None:
        modules["torchode dopri5"] = Torchode(1, **torchdiffeq_solver)  # type: ignore[arg-type]
    for module in modules.values():
        module.load_state_dict(encoder.state_dict())
    return {**modules, "nn.GRU": PlainGRU(encoder)}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def check_same(modules: dict[str, nn.Module], states: dict[str, Tensor]) -> list[str]:
    """Compare states and gradients of all solvers with the project's; return a line about each."""
    lines = []
    expected = gradients(modules["project"])
    for name, module in modules.items():
        if name in ("project", "nn.GRU"):
            continue
        found = gradients(module)
        assert found.keys() == expected.keys()
        difference = float((states[name] - states["project"]).abs().max())
        share = max(
            float((found[key] - expected[key]).abs().max() / expected[key].abs().max())
            for key in expected
        )
        lines.append(f"{name:20}states within {difference:.1e}, gradients within {share:.1e}")
        if difference > SAME_STATES or share > SAME_GRADIENTS.get(name, SAME_STATES):
            raise SystemExit(f"not the same work, nothing to compare: {lines[-1]}")
    return lines


def measure(size: int, repeats: int, seed: int) -> list[str]:
    """Check that all solvers agree, time them in turn, and return the lines of the report."""
    encoder, batch = load_batch(size, seed)
    weight = torch.randn(*batch[0].shape, encoder.hidden_dim)
    weight[~batch[2].any(dim=2)] = 0.0  # nn.GRU has states in padding
    modules = all_solvers(encoder)
    work = {
        name: (one_by_one if name in SLOW else together)(
            module, batch, weight, ahead=name not in PLANNED_IN_THE_CALL
        )
        for name, module in modules.items()
    }
    states = {name: run() for name, run in work.items()}  # also warms up
    same = check_same(modules, states)
    took: Timings = {name: [] for name in modules}
    for _ in range(repeats):
        for name in modules:
            runs = 1 if name in SLOW else FAST_RUNS
            took[name] += [seconds(work[name], modules[name]) for _ in range(runs)]
    lengths = batch[2].any(dim=2).sum(1)
    head = (
        f"\nbatch {size}: {int(lengths.sum())} observations, {int(lengths.min())} to "
        f"{int(lengths.max())} a patient"
    )
    return [head, *same, *table(took, size), *verdicts(took, size)]


def medians(took: Timings) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median wall time and the median processor time of each solver."""
    wall = {name: statistics.median(wall for wall, _ in values) for name, values in took.items()}
    worked = {name: statistics.median(cpu for _, cpu in values) for name, values in took.items()}
    return wall, worked


def table(took: Timings, size: int) -> list[str]:
    """Lay out medians, quartiles, milliseconds a patient and ratios.

    On a busy machine the wall time includes waiting; the processor time, with one thread, does not.
    """
    wall, worked = medians(took)
    lines = [
        f"{'':20}{'median ms':>10}{'quartiles':>18}{'ms a patient':>14}{'times project':>15}"
        f"{'processor ms':>14}{'times project':>15}"
    ]
    for name, values in took.items():
        low, high = np.quantile([wall for wall, _ in values], [0.25, 0.75]) * 1e3
        lines.append(
            f"{name:20}{wall[name] * 1e3:10.1f}{f'{low:.1f} - {high:.1f}':>18}"
            f"{wall[name] * 1e3 / size:14.3f}{wall[name] / wall['project']:15.2f}"
            f"{worked[name] * 1e3:14.1f}{worked[name] / worked['project']:15.2f}"
        )
    return lines


def verdicts(took: Timings, size: int) -> list[str]:
    """Return a line for each aim: met or missed."""
    wall, worked = medians(took)
    lines = []
    for name, aim in {"patient by patient": AIMS[size], **OTHER_AIMS}.items():
        if name in wall:
            ratio = wall[name] / wall["project"]
            verdict = "met" if ratio >= aim else "MISSED"
            lines.append(
                f"aim {verdict}: {name} takes {ratio:.3g} times as long; at least {aim:.3g}"
            )
    own, theirs = PLANNED_IN_THE_CALL
    lines.append(
        f"both planned in the call: patient by patient takes {wall[theirs] / wall[own]:.3g} "
        f"times as long, {worked[theirs] / worked[own]:.3g} by the processor's time"
    )
    if torchode is None:
        lines.append("torchode is not installed: left out")
    return lines


def simulated(
    features: int, observations: int, seed: int, patients: int = SIMULATED_PATIENTS
) -> tuple[Work, ClinicalODERNN]:
    """Return a pass over patients with so many observations, half of the values measured."""
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
    """Time the numbers of features beside each other; return the lines of the report."""
    lines = [
        f"\nms a patient, {SIMULATED_PATIENTS} simulated patients a batch",
        f"{'observations':14}" + "".join(f"{f'{features} features':>16}" for features in FEATURES),
    ]
    for observations in OBSERVATIONS:
        work = {features: simulated(features, observations, seed) for features in FEATURES}
        took: dict[int, list[float]] = {features: [] for features in FEATURES}
        for turn in range(1 + repeats * FAST_RUNS):
            for features, (run, encoder) in work.items():
                passed, _ = seconds(run, encoder)
                if turn:  # the first warms up
                    took[features].append(passed)
        median = {features: statistics.median(times) for features, times in took.items()}
        cells = (
            f"{1e3 * passed / SIMULATED_PATIENTS:.3f} ({passed / median[1]:.2f})"
            for passed in median.values()
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
    """Count what a pass keeps for more patients and more observations; return the lines."""
    lines = [
        "\nbytes kept for the derivative, a patient and observation (smallest = 1)",
        f"{'observations':14}" + "".join(f"{f'{patients} patients':>16}" for patients in PATIENTS),
    ]
    each = {
        (observations, patients): kept_bytes(simulated(1, observations, seed, patients)[0])
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
    parser.add_argument("--repeats", type=positive, default=7, help="timings of a slow solver (7)")
    parser.add_argument("--threads", type=positive, default=2, help="torch threads (2)")
    parser.add_argument("--seed", type=int, default=0, help="draws patients and weights (0)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        machine("torch", "torchdiffeq", "torchode", threads=torch.get_num_threads()),
        f"forward + backward, float32, hidden {ClinicalODERNN(1).hidden_dim}, seed {args.seed}, "
        f"{args.repeats} repeats ({FAST_RUNS} times as many of the fast solvers)",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    for size in AIMS:
        sys.stdout.write("\n".join(measure(size, args.repeats, args.seed)) + "\n")
        sys.stdout.flush()
    sys.stdout.write("\n".join([*shapes(args.repeats, args.seed), *memory(args.seed)]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
