"""Stages as the script wires them: parts that learn, their rates, batches, what is monitored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import medgemma_trainer as trainer
from language_models import CPU, patients
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.generation import score_reports
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from medgemma_clinical.models.trajectory_llm import LLMClassifier, TrajectoryLLM
from medgemma_clinical.training.evaluate import evaluate
from medgemma_clinical.training.stage import Stage
from stages import STAGE_1, stage_of_patients

MODES = ("classification", "generative")


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, Path]:
    """An untrained stage 1, and its file."""
    folder = tmp_path_factory.mktemp("run")
    stage = stage_of_patients(STAGE_1, "--members", "2")
    for name, weight in stage.model.named_parameters():
        if "wide" in name:  # a new one says nothing
            torch.nn.init.normal_(weight)
    stage.save(folder / "trajectory", stage.config)
    return stage, folder / TRAJECTORY_FILE


def started(seed: int) -> dict[str, Tensor]:
    """Return the weights that stage 2 adds to the base model, as they begin."""
    state = stage_of_patients("--mode", "classification", "--seed", str(seed)).model.state_dict()
    return {name: weight for name, weight in state.items() if "base_layer" not in name}


def test_the_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    first, again, other = started(0), started(0), started(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for part in ("lora_A", "projection.linear", "encoder.field", "stage1.members.0.head.facts"):
        names = [name for name in first if part in name and "weight" in name]
        assert names
        assert not any(torch.equal(first[name], other[name]) for name in names)


def part_of(name: str) -> str:
    """Return the part of a parameter: of a member, whose number and encoder or head."""
    words = name.removeprefix("stage1.").split(".")
    return ".".join(words[: 3 if words[0] == "members" else 1])


@pytest.mark.parametrize(
    ("mode", "encoder"),
    [
        ("classification", "learns"),
        ("classification", "frozen"),
        ("trajectory", "frozen"),
        ("generative", "learns"),
        ("generative", "of stage 1"),
    ],
)
def test_a_stage_trains_its_parts_and_no_others(
    mode: str, encoder: str, stage1: tuple[Stage, Path]
) -> None:
    flags = {"learns": ["--members", "2"], "frozen": ["--members", "2", "--freeze_ode"]}.get(
        encoder, ["--ode_checkpoint", str(stage1[1])]
    )
    kind = [STAGE_1] if mode == "trajectory" else ["--mode", mode]
    stage = stage_of_patients(*kind, *flags)
    learning = {part_of(n) for n, p in stage.model.named_parameters() if p.requires_grad}
    expected = set() if mode == "trajectory" else {"projection", "llm"}
    expected |= {"head"} if mode == "classification" else set()
    parts = {"learns": ("encoder", "head"), "frozen": ("head",)}.get(encoder, ())
    expected |= {f"members.{k}.{part}" for k in range(2) for part in parts}
    assert learning == expected
    grouped = [id(p) for group in stage.parameter_groups() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in stage.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((STAGE_1, "--encoder_lr", "0.5"), {"members": 0.5}),
        (
            ("--encoder_lr", "0.5", "--projection_lr", "0.4", "--adapter_lr", "0.3"),
            {"stage1": 0.5, "projection": 0.4, "llm": 0.3, "head": 1e-3},
        ),
        (
            ("--freeze_ode", "--head_lr", "0.2"),
            {"stage1": 2e-3, "projection": 1e-3, "llm": 2e-4, "head": 0.2},
        ),
        (("--mode", "generative", "--soft_prompt", "off"), {"llm": 2e-4}),
    ],
)
def test_each_part_learns_at_the_rate_of_its_flag(
    flags: tuple[str, ...], expected: dict[str, float]
) -> None:
    stage = stage_of_patients(*flags)
    parts = {id(p): name.split(".")[0] for name, p in stage.model.named_parameters()}
    found = {
        (parts[id(p)], group["lr"]) for group in stage.parameter_groups() for p in group["params"]
    }
    assert sorted(found) == sorted(expected.items())


def test_stage_2_reads_no_answer_and_stage_3_monitors_its_loss() -> None:
    classification, generative = (stage_of_patients("--mode", mode) for mode in MODES)
    assert (classification.monitor, classification.higher_is_better) == ("val_auroc", True)
    assert (generative.monitor, generative.higher_is_better) == ("val_loss", False)
    for stage, answered in ((classification, False), (generative, True)):
        batch = next(iter(stage.loaders["val"]))
        ends = batch["verdict"] + 1 == batch["text_mask"].sum(1)
        assert bool(ends.all()) != answered


def test_a_new_stage_2_predicts_what_stage_1_does(stage1: tuple[Stage, Path]) -> None:
    stage = stage_of_patients("--mode", "classification", "--ode_checkpoint", str(stage1[1]))
    one = evaluate(stage1[0].model, stage1[0].loaders["test"], CPU)
    two = evaluate(stage.model, stage.loaders["test"], CPU)
    np.testing.assert_allclose(two.logit, one.logit, atol=1e-6)
    assert float(np.std(one.logit)) > 0
    assert isinstance(stage.model, LLMClassifier)
    assert isinstance(stage.model.stage1, TrajectoryClassifier)
    assert len(stage.model.stage1.members) == 2
    assert stage.config["inputs"] == {
        "facts": ["static_bmi [kg/m2]", "static_admissions"],
        "prediction_time": True,
    }


def test_a_stage_without_stage_1_reads_no_facts_and_no_prediction_time() -> None:
    """Else a file that lacks them would be refused for nothing."""
    config = stage_of_patients("--soft_prompt", "off").config
    assert config["inputs"] == {"facts": [], "prediction_time": False}


@pytest.mark.parametrize(
    ("flags", "inputs"),
    [
        (("--facts", "off"), {"facts": [], "prediction_time": True}),
        (
            ("--prediction_time", "off"),
            {"facts": ["static_bmi [kg/m2]", "static_admissions"], "prediction_time": False},
        ),
    ],
)
def test_stage_1_decides_what_stage_2_reads(
    flags: tuple[str, str], inputs: dict[str, Any], tmp_path: Path
) -> None:
    one = stage_of_patients(STAGE_1, *flags)
    one.save(tmp_path / "trajectory", one.config)
    loaded = ("--ode_checkpoint", str(tmp_path / TRAJECTORY_FILE))
    for more in ((), flags):
        stage = stage_of_patients(*loaded, *more)
        assert stage.config["inputs"] == one.config["inputs"] == inputs
    batch = stage.loaders["test"].collate_fn([13, 15])
    assert batch["facts"].shape == (2, len(inputs["facts"]))
    last = batch["times"].amax(dim=1)
    assert torch.equal(batch["prediction_hours"], last) != inputs["prediction_time"]


# --------------------------------------------------------------------------- members


def test_the_first_member_is_the_single_run_and_the_second_that_of_the_next_seed() -> None:
    flags = ("--dynamics", "decay")
    both = stage_of_patients(STAGE_1, "--members", "2", "--seed", "4", *flags).model.state_dict()
    for member, seed in enumerate(("4", "5")):
        alone = stage_of_patients(STAGE_1, "--seed", seed, *flags).model.state_dict()
        for name, tensor in alone.items():
            assert torch.equal(both[name.replace("members.0", f"members.{member}")], tensor), name
    learning = [name for name in alone if "head.facts.0.weight" in name or "read.weight" in name]
    assert len(learning) == 2
    assert not any(
        torch.equal(both[name], both[name.replace("members.0", "members.1")]) for name in learning
    )


def test_the_seed_behind_the_last_is_the_first() -> None:
    last = stage_of_patients(STAGE_1, "--seed", str(2**32 - 1), "--members", "2").model
    first = stage_of_patients(STAGE_1, "--seed", "0").model.get_parameter(
        "members.0.head.attention.weight"
    )
    assert torch.equal(last.get_parameter("members.1.head.attention.weight"), first)


def test_more_soft_tokens_than_observations_cost_nothing() -> None:
    model = stage_of_patients("--mode", "classification", "--num_prefix_tokens", "4096").model
    assert isinstance(model, TrajectoryLLM)
    assert model.tokens == max(patients().lengths)


def test_layers_are_recomputed_where_the_flag_asks_for_it() -> None:
    for flags, on in (([], False), (["--gradient_checkpointing"], True)):
        model = stage_of_patients("--mode", "classification", *flags).model
        assert isinstance(model, TrajectoryLLM)
        assert model.body.gradient_checkpointing == on


def test_a_written_verdict_is_the_decision_of_the_row() -> None:
    stage = stage_of_patients("--mode", "generative")
    assert stage.generate is not None
    predictions = evaluate(stage.model, stage.loaders["test"], CPU)
    threshold = float(np.median(predictions.probability))
    decided = predictions.with_rule(DecisionRule(threshold=threshold))
    assert decided.alarms.tolist() != predictions.alarms.tolist(), "the threshold must matter"
    lines, _ = score_reports(patients(), stage.generate(decided), decided, 0, 0)
    assert [line["verdict"] for line in lines] == decided.alarms.astype(int).tolist()


class GapEncoder(nn.Module):
    """A second encoder, by the protocol alone: a GRU that reads values and gaps."""

    name: ClassVar[str] = "gap_gru"
    longest_gap_hours = float("inf")

    def __init__(self, input_dim: int, hidden_dim: int = 8, **options: Any) -> None:
        super().__init__()
        self.input_dim, self.hidden_dim, self.options = input_dim, hidden_dim, options
        self.cell = nn.GRU(input_dim + 1, hidden_dim, batch_first=True)

    @property
    def config(self) -> dict[str, Any]:
        return {"input_dim": self.input_dim, "hidden_dim": self.hidden_dim, **self.options}

    def fit_normalizer(self, values: Tensor, observed: Tensor) -> None:
        assert values[observed].isfinite().all()

    def forward(self, times: Tensor, values: Tensor, observed: Tensor, until: Tensor) -> Tensor:
        states: Tensor = self.cell(torch.cat([values, times[:, :, None].log1p()], dim=2))[0]
        present = observed.any(dim=2)
        last = states[torch.arange(len(states)), present.sum(dim=1) - 1]
        return torch.cat([states * present.unsqueeze(2), last.unsqueeze(1)], dim=1)


def test_another_encoder_is_one_class_and_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoders: Any = trainer.ENCODERS
    known = encoders.places
    own = {GapEncoder.name: f"{__name__}:{GapEncoder.__name__}"}
    monkeypatch.setattr(encoders, "places", own | known)  # a new stage 1 takes the first
    stage = stage_of_patients(STAGE_1)
    assert isinstance(stage.model, TrajectoryClassifier)
    assert isinstance(stage.model.encoder, GapEncoder)
    stage.save(tmp_path / "trajectory", stage.config)
    monkeypatch.setattr(encoders, "places", known | own)
    later = stage_of_patients("--ode_checkpoint", str(tmp_path / TRAJECTORY_FILE))
    assert isinstance(later.model, TrajectoryLLM)
    assert isinstance(later.model.stage1, TrajectoryClassifier)
    assert isinstance(later.model.stage1.encoder, GapEncoder)
    assert later.config["encoder"]["name"] == "gap_gru"


def test_a_solver_that_differs_from_stage_1_is_said(
    stage1: tuple[Stage, Path], caplog: pytest.LogCaptureFixture
) -> None:
    stage_of_patients("--ode_checkpoint", str(stage1[1]), "--solver", "euler")
    assert "trained with --solver rk4, now euler" in caplog.text
