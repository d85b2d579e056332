"""Time the encoder against the same network solved patient by patient.

Usage:
    python tests/benchmarks/encoder.py [--repeats 3] [--threads 2] [--seed 0]

Forward and backward over patients of the sample data, every way in turn, so that a load on the
machine meets all of them. The ways:

    project             ClinicalODERNN as it is, the whole batch at once
    patient by patient  the same weights, torchdiffeq dopri5 (rtol 1e-3, atol 1e-4), one patient a
                        call, one odeint a gap; what the project is compared with
    torchdiffeq rk4     the same weights, the whole batch, each row its own gap, odeint's rk4
    nn.GRU              torch's GRU of the same width on the same padded inputs: no equation

The first three must give the same states before anything is timed. Then the project alone on
made-up patients with 1, 9 and 36 features and 10, 20 and 70 observations each.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchdiffeq
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dataset_format import MIMICtrajectoryDataset  # noqa: E402
from dte_encoder import MAX_SCALED_STEP, ClinicalODERNN  # noqa: E402

DATA = ROOT / "tests" / "data" / "physionet2012_bicarbonate.csv"
TARGETS = {16: 40.0, 256: 120.0}
"""Batch size, and how many times faster than patient by patient the project shall be."""

FAST_RUNS = 10
"""Timings of a fast way for each one of the slow way: they are short, hence noisy."""

SAME_STATES = 1e-3
"""Two solves of the same network may differ by this in a layer-normalised state."""

FEATURES, OBSERVATIONS, MADE_UP_PATIENTS = (1, 9, 36), (10, 20, 70), 64

Batch = tuple[Tensor, Tensor, Tensor]
Pass = Callable[[], Tensor]


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


class PlainGRU(nn.Module):
    """torch's GRU over the encoder's own padded inputs."""

    def __init__(self, encoder: ClinicalODERNN) -> None:
        super().__init__()
        self.encoder = encoder
        self.gru = nn.GRU(encoder.update.input_size, encoder.hidden_dim, batch_first=True)

    def forward(self, times: Tensor, values: Tensor, observed: Tensor) -> Tensor:
        inputs, _ = self.encoder._inputs(times, values, observed)
        states: Tensor = self.gru(self.encoder.read(inputs).relu())[0]
        return states


def patient_by_patient(encoder: ClinicalODERNN, batch: Batch) -> list[Tensor]:
    """Give each patient's states (1, L_b, H), one call of the encoder a patient."""
    lengths = batch[2].any(dim=2).sum(1).tolist()
    return [
        encoder(*(tensor[i : i + 1, :length] for tensor in batch))
        for i, length in enumerate(lengths)
    ]


def together(encoder: nn.Module, batch: Batch, weight: Tensor) -> Tensor:
    """Run forward and backward over the padded batch; give the states."""
    encoder.zero_grad()
    states: Tensor = encoder(*batch)
    (states * weight).sum().backward()
    return states.detach()


def one_by_one(encoder: ClinicalODERNN, batch: Batch, weight: Tensor) -> Tensor:
    """Run forward and backward patient by patient; give the states as one padded tensor."""
    encoder.zero_grad()
    states = torch.zeros_like(weight)
    for i, single in enumerate(patient_by_patient(encoder, batch)):
        length = single.shape[1]
        (single * weight[i : i + 1, :length]).sum().backward()
        states[i, :length] = single.detach()[0]
    return states


def seconds(run: Pass) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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


def measure(size: int, repeats: int, seed: int) -> list[str]:
    """Check that all ways agree, time them in turn, and give the lines of the report."""
    encoder, batch = load_batch(size, seed)
    scale = encoder.time_scale
    single = with_weights_of(
        encoder, ClinicalODERNN(1, time_scale=scale, solver="dopri5", rtol=1e-3, atol=1e-4)
    )
    library = with_weights_of(encoder, TorchdiffeqRK4(1, time_scale=scale, solver="midpoint"))
    plain = PlainGRU(encoder)
    weight = torch.randn(*batch[0].shape, encoder.hidden_dim)
    ways: dict[str, Pass] = {
        "patient by patient": lambda: one_by_one(single, batch, weight),
        "project": lambda: together(encoder, batch, weight),
        "torchdiffeq rk4": lambda: together(library, batch, weight),
        "nn.GRU": lambda: together(plain, batch, weight),
    }
    states = {name: run() for name, run in ways.items() if name != "nn.GRU"}  # also warms up
    difference = max(float((s - states["project"]).abs().max()) for s in states.values())
    if difference > SAME_STATES:
        raise SystemExit(f"batch {size}: the states differ by {difference:.1e}: nothing to compare")

    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            runs = 1 if name == "patient by patient" else FAST_RUNS
            took[name] += [seconds(run) for _ in range(runs)]
    lengths = batch[2].any(dim=2).sum(1)
    head = (
        f"\nbatch {size}: {int(lengths.sum())} observations, {int(lengths.min())} to "
        f"{int(lengths.max())} a patient; largest difference of a state {difference:.1e}"
    )
    return [head, *table(took, size)]


def table(took: dict[str, list[float]], size: int) -> list[str]:
    """Lay out medians, quartiles, milliseconds a patient and ratios."""
    median = {name: statistics.median(values) for name, values in took.items()}
    lines = [f"{'':20}{'median ms':>10}{'quartiles':>18}{'ms a patient':>14}{'times project':>15}"]
    for name, values in took.items():
        low, high = np.quantile(values, [0.25, 0.75]) * 1e3
        lines.append(
            f"{name:20}{median[name] * 1e3:10.1f}{f'{low:.1f} - {high:.1f}':>18}"
            f"{median[name] * 1e3 / size:14.3f}{median[name] / median['project']:15.2f}"
        )
    ratio = median["patient by patient"] / median["project"]
    verdict = "reached" if ratio >= TARGETS[size] else "MISSED"
    lines.append(f"{ratio:.0f} times patient by patient; target {TARGETS[size]:.0f}: {verdict}")
    return lines


def made_up(features: int, observations: int, seed: int) -> Pass:
    """Give a pass over patients of so many observations, half of the values measured."""
    generator = torch.Generator().manual_seed(seed)
    shape = (MADE_UP_PATIENTS, observations)
    gaps = torch.empty(shape).exponential_(1 / 4, generator=generator)  # 4 hours on average
    values = torch.randn((*shape, features), generator=generator)
    observed = torch.rand((*shape, features), generator=generator) < 0.5
    observed[..., 0] |= ~observed.any(dim=2)
    torch.manual_seed(seed)
    encoder = ClinicalODERNN(features)
    weight = torch.randn(*shape, encoder.hidden_dim, generator=generator)
    return lambda: together(encoder, (gaps.cumsum(1), values, observed), weight)


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
            for features, run in ways.items():
                if turn:  # the first warms up
                    took[features].append(seconds(run))
                else:
                    run()
        median = {features: statistics.median(times) for features, times in took.items()}
        cells = (
            f"{1e3 * median[features] / MADE_UP_PATIENTS:.3f} ({median[features] / median[1]:.2f})"
            for features in FEATURES
        )
        lines.append(f"{observations:<14}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def processor() -> str:
    """Name the processor, as precisely as the system tells."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the encoder on the sample data.")
    parser.add_argument("--repeats", type=positive, default=3, help="timings of the slow way (3)")
    parser.add_argument("--threads", type=positive, default=2, help="torch threads (2)")
    parser.add_argument("--seed", type=int, default=0, help="draws patients and weights (0)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        f"{processor()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchdiffeq {torchdiffeq.__version__}",
        f"forward + backward, float32, hidden {ClinicalODERNN(1).hidden_dim}, seed {args.seed}, "
        f"{args.repeats} repeats ({FAST_RUNS} times as many of the fast ways)",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    for size in TARGETS:
        sys.stdout.write("\n".join(measure(size, args.repeats, args.seed)) + "\n")
        sys.stdout.flush()
    sys.stdout.write("\n".join(shapes(args.repeats, args.seed)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
