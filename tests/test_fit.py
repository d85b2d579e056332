"""Training from Python: the same models as the command line, and nothing on the disk unasked."""

import inspect
import json
import logging
import os
import stat
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from conftest import SAMPLE, whole_reports
from language_models import TINY_MODEL
from medgemma_clinical.commands import logs, results
from medgemma_clinical.files import InputError
from medgemma_trainer import (
    TrajectoryModel,
    cross_validate,
    fit_classification,
    fit_generative,
    fit_trajectory,
)
from own_dataset import Lactate
from srtr_dataset import SRTRTrajectoryDataset
from srtr_files import synthetic_tables, write_folder
from stages import arguments
from trajectories import LABEL

pytestmark = pytest.mark.slow

SHORT = {"min_cell": 0, "trajectory_epochs": 1}
LLM = {"min_cell": 0, "batch_size": 8, "model_name": TINY_MODEL, "epochs": 1}
OWN = {"trajectory": ("encoder_lr", *SHORT), "generative": ("encoder_lr", "adapter_lr", *LLM)}


@pytest.fixture(scope="module")
def rows():
    """Sixty stays of the sample data."""
    return pd.read_csv(SAMPLE, nrows=60)


def keywords_of(run):
    """Return the flags that a run of the command line was given."""
    arguments = json.loads((run / "run.json").read_text())["arguments"]
    return {name: arguments[name] for name in ("batch_size", *OWN[run.name])}


def test_fit__trains_the_model_of_the_command_and_leaves_no_file(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(results.decision, "fit_residual_weight", lambda *_: 1.0)  # as in the runs
    data = runs / "train.csv"
    stage_1 = fit_trajectory(data, **keywords_of(runs / "trajectory"))
    models = stage_1, fit_generative(data, stage_1, **keywords_of(runs / "generative"))
    few = pd.read_csv(data, dtype=str).tail(9)
    assert not list(tmp_path.iterdir())
    for model in models:
        written = TrajectoryModel.from_pretrained(runs / model.stage)
        probability = written.predict_proba(few)
        np.testing.assert_allclose(model.predict_proba(few), probability, rtol=0, atol=1e-6)
        own, expected = (each.results()["auroc"].iloc[0] for each in (model, written))
        assert (own, model.threshold) == pytest.approx((expected, written.threshold))
    assert model.write_reports(few) == written.write_reports(few)


def test_fit__writes_the_files_of_the_command_for_the_owner_alone(runs, tmp_path):
    words = {**SHORT, "trajectory_epochs": 2}  # one epoch alone has no learning curve
    with whole_reports():
        fit_trajectory(runs / "train.csv", **words, output_dir=tmp_path / "run")
    names = [
        {path.name for path in (*folder.glob("*.pt"), *(folder / "trajectory").rglob("*"))}
        for folder in (runs, tmp_path / "run")
    ]
    (log,) = (tmp_path / "run" / "trajectory").glob("train_*.log")
    assert names[1] - {log.name} == names[0]
    for path in (tmp_path / "run").rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_fit__takes_the_flags_with_their_defaults(rows):
    seen = []

    def train(args, *_):
        seen.append(vars(args))
        raise InterruptedError

    training = replace(trainer.PYTHON, train_stage=train)
    for keywords in ({}, {"facts": False, "series": None, "members": 3, "deterministic": False}):
        with pytest.raises(InterruptedError):
            training.fit_classification(rows, **keywords)
    defaults = vars(arguments())
    assert seen == [defaults, {**defaults, "facts": "off", "members": 3}]


@pytest.mark.parametrize(
    ("keywords", "error", "name"),
    [
        ({"epoch": 3}, TypeError, "'epoch'"),
        ({"data_path": "x.csv"}, TypeError, "data_path"),
        ({"trajectory_only": True}, TypeError, "trajectory_only"),
        ({"ode_checkpoint": "x.pt"}, TypeError, "ode_checkpoint"),
        ({"folds": 3}, TypeError, "cross_validate"),
        ({"trajectory_epochs": 3}, TypeError, "stage 1"),
        ({"batch_size": 0}, InputError, "--batch_size"),
        ({"dynamics": "fast"}, InputError, "--dynamics"),
        ({"organ": "liver"}, InputError, "--organ"),
        ({"soft_prompt": "off", "stage1_logit": "off"}, InputError, "--stage1_logit"),
        *(({name: 1}, InputError, name) for name in ("resume", "save_every", "report_patients")),
        *(({"rows": rows}, InputError, "rows") for rows in (None, [1, 2], np.zeros(3), {"a": 1})),
    ],
)
def test_fit__names_a_wrong_argument(keywords, error, name, rows):
    with pytest.raises(error, match=name):
        fit_classification(**{"rows": rows, **keywords})


@pytest.mark.parametrize(
    "begin", [fit_trajectory, fit_classification, cross_validate, TrajectoryModel.from_pretrained]
)
def test_python_sets_the_environment_that_the_command_line_sets(begin, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", False)
    with mock.patch.dict(os.environ):
        os.environ.pop("HF_HUB_DISABLE_TELEMETRY", None)
        with pytest.raises(InputError):
            begin(tmp_path / "missing.csv")
        assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
        assert "HF_HUB_DISABLE_TELEMETRY" in os.environ


def test_fit__stage_1_refuses_the_keywords_of_other_stages_and_all_are_in_the_signature(rows):
    keywords = [set(inspect.signature(fit).parameters) for fit in (fit_trajectory, fit_generative)]
    for name in ("epochs", "lora_rank", "model_name"):
        assert [name in each for each in keywords] == [False, True]
        with pytest.raises(TypeError, match=f"{name} is for stages 2 and 3"):
            fit_trajectory(rows, **{name: 3})
    assert keywords[0] - keywords[1] == {"trajectory_epochs"}
    assert inspect.signature(fit_trajectory).parameters["trajectory_epochs"].default == 100


def test_fit__shows_a_bar_with_the_score_of_the_last_epoch_on_a_terminal(rows, capsys, monkeypatch):
    for shown in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=shown: shown)
        # A bar is drawn ten times a second: three epochs may take less.
        fit_trajectory(rows, trajectory_epochs=3, on_epoch=lambda metrics: time.sleep(0.15))
        text = capsys.readouterr().err
        assert ("/3:" in text, "val loss " in text) == (shown, shown)


def test_fit__takes_an_encoder_as_a_model_or_where_it_lies(runs, tmp_path):
    model, data = TrajectoryModel.from_pretrained(runs / "trajectory"), runs / "train.csv"
    model.save_pretrained(tmp_path / "saved")
    for encoder in (model, str(runs / "trajectory"), tmp_path / "saved"):
        with pytest.raises(InputError, match="held-out"):
            fit_classification(data, encoder, seed=1, **LLM)
    assert fit_classification(data, tmp_path / "saved", **LLM).stage == "classification"
    with pytest.raises(ValueError, match="trajectory"):
        fit_classification(data, TrajectoryModel.from_pretrained(runs / "generative"), **LLM)


def test_fit__takes_a_data_set_that_was_read(tmp_path):
    folder = write_folder(tmp_path, *synthetic_tables("kidney"), "kidney")
    dataset = SRTRTrajectoryDataset(folder)
    model = fit_trajectory(dataset, **SHORT)
    lines = model.predictions(folder).set_index("id")["probability"]  # unknown outcomes too
    expected = lines.loc[dataset.ids.tolist()].to_numpy(dtype=np.float64)
    np.testing.assert_allclose(model.predict_proba(dataset)[:, 1], expected, atol=1e-6)
    with pytest.raises(InputError, match="max_len"):
        fit_trajectory(dataset, max_len=5)


def test_fit__takes_a_data_set_of_the_callers_class_to_the_end(tmp_path):
    values = np.random.default_rng(0).uniform(0.5, 6, (120, 3)).round(1)
    dataset = Lactate(values, values[:, -1] > 5)
    with whole_reports():
        model = fit_trajectory(dataset, **SHORT, output_dir=tmp_path)
    written, part = tmp_path / "trajectory", dataset.subset(np.arange(9))
    assert (written / "tripod.md").exists()
    expected = TrajectoryModel.from_pretrained(written).predict_proba(part)
    np.testing.assert_allclose(model.predict_proba(part), expected, rtol=0, atol=1e-6)
    assert len(cross_validate(dataset, folds=2, **SHORT).predictions) == len(dataset)
    with pytest.raises(InputError, match="lactate"):  # of which a path says nothing
        model.predict_proba("rows.csv")


def test_fit__of_a_search_reads_no_test_part_fits_no_baseline_and_ends_when_told(
    rows, runs, tmp_path, monkeypatch
):
    parts = ["train", "train", "train", "train", "val", "test"] * 10
    table = rows.sort_values(LABEL).assign(split=parts)
    changed = table.assign(**{LABEL: table[LABEL] ^ (table["split"] == "test")})
    for module in (trainer, results.baselines_of):
        monkeypatch.setattr(module, "fit_baselines", None)
    search = {"min_cell": 0, "trajectory_epochs": 4, "test": False, "baselines": False}
    history = []

    def on_epoch(metrics):
        history.append(metrics)
        return metrics["epoch"] == 2

    trials = [fit_trajectory(x, **search, on_epoch=on_epoch) for x in (table, changed)]
    trial = trials[0]
    assert [metrics["epoch"] for metrics in history] == [1, 2, 1, 2]
    assert len(trial.results()) == 1
    assert trials[1].results().equals(trial.results())
    tested = TrajectoryModel.from_pretrained(runs / "trajectory")
    assert [model.results().columns.name for model in (trial, tested)] == ["validation", "test"]
    trial.save_pretrained(tmp_path / "trial")
    risks = TrajectoryModel.from_pretrained(tmp_path / "trial").predict_proba(rows)
    np.testing.assert_allclose(trial.predict_proba(rows), risks, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="output_dir"):
        fit_trajectory(table, **search, output_dir=tmp_path / "run")
    with pytest.raises(InputError, match="on_epoch"):  # it would wait for itself
        fit_trajectory(table, **search, on_epoch=lambda _: fit_trajectory(table, **search))


def test_fit__waits_for_the_training_of_another_thread(rows):
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(fit_trajectory, rows, **SHORT) for _ in range(2)]
    risks = [fitted.result().predict_proba(rows) for fitted in both]
    np.testing.assert_array_equal(*risks)


def test_fit__and_predictions_take_one_thread_and_the_caller_keeps_his(rows, monkeypatch):
    def seen(*_):
        threads.add(torch.get_num_threads())

    monkeypatch.delenv("OMP_NUM_THREADS")
    risks, threads = [], set()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            with torch.nn.modules.module.register_module_forward_hook(seen):
                model = fit_trajectory(rows, **SHORT, test=False, baselines=False, on_epoch=seen)
                risks.append(model.predict_proba(rows))
            assert (threads, torch.get_num_threads()) == ({1}, count)
        finally:
            torch.set_num_threads(1)
    np.testing.assert_array_equal(*risks)


def test_fit__goes_on_after_an_interrupt(rows, tmp_path):
    stopped = mock.patch.object(trainer, "step", side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(KeyboardInterrupt) as caught:
        fit_trajectory(rows, **SHORT, output_dir=tmp_path)
    assert str(tmp_path) in caught.value.__notes__[0]
    assert fit_trajectory(rows, **SHORT, output_dir=tmp_path, resume=True).stage == "trajectory"


def test_fit__logs_to_stderr_and_leaves_the_callers_logging(rows, tmp_path, capfd, monkeypatch):
    logger = logging.getLogger("medgemma_clinical")
    before = logger.level, list(logger.handlers)
    monkeypatch.setattr(logging.root, "handlers", [])  # without pytest's own
    fit_trajectory(rows.drop(columns="subject_id"), trajectory_epochs=1, output_dir=tmp_path)
    assert (logger.level, list(logger.handlers), logging.root.handlers) == (*before, [])
    (log,) = (tmp_path / "trajectory").glob("train_*.log")
    out, error = capfd.readouterr()
    assert all("subject_id" in text for text in (log.read_text(), error))
    assert "epoch" not in out


@pytest.mark.parametrize("name", ["", "medgemma_clinical"])
@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING])
def test_the_level_of_the_caller_holds_and_the_log_of_a_run_has_all(name, level, tmp_path):
    caller, handler, levels = logging.getLogger(name), logging.Handler(), []
    handler.emit = lambda record: levels.append(record.levelno)
    all_levels = [logging.DEBUG, logging.INFO, logging.WARNING]

    def log():
        levels.clear()
        for each in all_levels:
            logging.getLogger("medgemma_clinical.part").log(each, "of level %d", each)
        return levels

    with logs.restored():
        caller.handlers = [handler]
        caller.setLevel(level)
        with logs.recorded():
            logs.RUN_LOG.open(tmp_path / "run.log")
            assert log() == [each for each in all_levels if each >= level]
        assert log() == [each for each in all_levels if each >= level]
    assert (tmp_path / "run.log").read_text().count("of level") == 3
