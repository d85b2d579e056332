"""The demo: three training commands, shown as a user would type them."""

import logging
import shlex

import pytest

import medgemma_trainer as trainer
from medgemma_clinical.commands import flags
from medgemma_clinical.commands.demo import SAMPLE_DATA, run_demo, webbrowser
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from predicting import STAGES


def arguments(folder, *more):
    return trainer.build_parser().parse_args(["--demo", "--output_dir", str(folder), *more])


def test_the_three_commands_that_are_shown_are_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    made, encoder = [], tmp_path / TRAJECTORY_FILE
    args = arguments(tmp_path, "--seed", "4")
    assert run_demo(args, lambda own: made.append(own) or 0) == 0
    stages = [(own.trajectory_only, own.mode, own.ode_checkpoint) for own in made]
    expected = [("classification", encoder), ("generative", encoder)]
    assert stages == [(True, "classification", None), *((False, *each) for each in expected)]
    shown = [text.split("medgemma_trainer.py ")[1] for text in caplog.messages if "$" in text]
    for own, words in zip(made, map(shlex.split, shown), strict=True):
        assert (own.demo, own.data_path, own.quantization) == (False, SAMPLE_DATA, "none")
        typed = flags.complete(trainer.build_parser().parse_args(words))
        flags.check_flags(typed, {word for word in words if word.startswith("--")})
        typed.model_name = own.model_name  # which stage 1 does not read
        assert vars(typed) | {"precision": own.precision} == vars(own)
    pages = [str(tmp_path / stage / "report.html") for stage in STAGES]
    assert [line.strip() for line in caplog.messages[-1].splitlines()[2:]] == pages


@pytest.mark.parametrize("browser", [True, False])
def test_the_first_page_is_opened_where_there_is_a_browser(browser, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda page: opened.append(page) or browser)
    assert run_demo(arguments(tmp_path), lambda _: 0) == 0
    assert opened == []
    assert run_demo(arguments(tmp_path, "--open"), lambda _: 0) == 0
    assert opened == [(tmp_path / "trajectory" / "report.html").as_uri()]


def test_a_stage_that_fails_ends_the_demo_with_its_code(tmp_path):
    codes = iter([0, 130, 0])
    assert run_demo(arguments(tmp_path), lambda _: next(codes)) == 130
    assert list(codes) == [0]
