"""The demo: three training commands, shown as a user would type them."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from medgemma_clinical.commands.demo import SAMPLE_DATA, run_demo, webbrowser
from medgemma_clinical.evaluation.report import STAGE_TITLES


def arguments(folder: Path) -> Namespace:
    """Flags that the demo reads, sets, or leaves alone."""
    flags: dict[str, Any] = {
        "demo": True,
        "log_file": "auto",
        "mode": "classification",
        "ode_checkpoint": None,
        "open": False,
        "output_dir": folder,
        "patience": 10,
        "quantization": "nf4",
        "seed": 4,
        "trajectory_only": False,
    }
    return Namespace(**flags)


def test_the_three_stages_are_run_with_the_encoder_of_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Namespace] = []

    def train(args: Namespace) -> int:
        made.append(args)
        return 0

    with caplog.at_level(logging.INFO):
        assert run_demo(arguments(tmp_path), train) == 0
    encoder = tmp_path / "medgemma_trajectory_best.pt"
    stages = [(own.trajectory_only, own.mode, own.ode_checkpoint) for own in made]
    assert stages == [
        (True, "classification", None),
        (False, "classification", encoder),
        (False, "generative", encoder),
    ]
    for own in made:
        assert (own.demo, own.model_name, own.quantization) == (False, "tiny", "none")
        assert (own.data_path, own.seed, own.patience) == (SAMPLE_DATA, 4, 10)
        assert own.data_path.exists()
    commands = [text for text in caplog.messages if "$ python medgemma_trainer.py" in text]
    assert len(commands) == 3
    assert "--trajectory_only --data_path" in commands[0]
    assert "--mode generative" in commands[2]
    assert f"--ode_checkpoint {encoder}" in commands[2]
    assert all("--max_samples 1000 " in command for command in commands)
    assert "True" not in "".join(commands)


@pytest.mark.parametrize("asked", [False, True])
def test_the_pages_are_listed_last_and_the_first_is_opened_where_that_is_asked_for(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[str] = []

    def show(page: str) -> bool:
        opened.append(page)
        return True

    monkeypatch.setattr(webbrowser, "open", show)
    args = arguments(tmp_path)
    args.open = asked
    with caplog.at_level(logging.INFO):
        assert run_demo(args, lambda _: 0) == 0
    pages = [tmp_path / stage / "report.html" for stage in STAGE_TITLES]
    listed = [f"{title}: {page}" for title, page in zip(STAGE_TITLES.values(), pages, strict=True)]
    assert [text.strip() for text in caplog.messages[-4:]] == ["Pages to open:", *listed]
    assert opened == ([pages[0].as_uri()] if asked else [])


def test_a_machine_without_a_browser_is_said_and_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda page: False)
    args = arguments(tmp_path)
    args.open = True
    assert run_demo(args, lambda _: 0) == 0
    assert "no browser on this machine" in caplog.messages[-1]


def test_a_stage_that_fails_ends_the_demo_with_its_code(tmp_path: Path) -> None:
    codes = iter([0, 130, 0])
    assert run_demo(arguments(tmp_path), lambda _: next(codes)) == 130
    assert list(codes) == [0]
