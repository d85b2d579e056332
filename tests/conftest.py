"""Shared by all tests: no network, small data in the user's format, one run of each stage."""

import contextlib
import gc
import os
import signal
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports transformers
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # beside which an error would not be one line
os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start, too: the cores have tests to run
os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # folds in this process: a new one imports for seconds

from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from matplotlib.figure import Figure

for each in (signal.SIGINT, signal.SIGHUP):  # nohup and a shell's background ignore them
    signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)

torch.set_num_threads(1)  # the models of the tests are too small to share

if "TEST_MODELS" not in os.environ:  # the workers of xdist inherit it
    MODELS = tempfile.TemporaryDirectory(prefix="test_models_")
    os.environ["TEST_MODELS"] = MODELS.name

APPROVED = Path(__file__).parent / "approved"
DATA = Path(__file__).parent / "data"
SAMPLE = DATA.parent.parent / "medgemma_clinical" / "sample" / "physionet2012_bicarbonate.csv"


def pytest_addoption(parser):
    parser.addoption("--approve", action="store_true", help="accept what pages and prompts say now")


DRAWS, DRAW = 100, Figure.savefig


def save_blank(figure, place, **_):
    """Stand in for ``savefig``."""
    place.write(b"<svg/>") if hasattr(place, "write") else Path(place).write_bytes(b"%PDF")


@pytest.fixture(scope="module", autouse=True)
def quick(request):
    """Draw few samples and no figure: for a report both take longer than to train its model.

    Each page is of the same day, and no file waits for the disk.

    A module that is about them has its own ``DRAWS``, ``FIGURES = True``, and ``REPORTS = True``
    where runs write a whole report rather than an empty file. ``TUNES = False``: no settings of
    baselines are searched.
    """
    from medgemma_clinical.evaluation import baselines, metrics, report, updating

    gc.freeze()  # a collection need not look at what was imported
    figures = getattr(request.module, "FIGURES", False)
    pages = sys.modules.get("medgemma_clinical.commands.pages")  # not for tests of no run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(metrics, "REPLICATES", getattr(request.module, "DRAWS", DRAWS))
        patch.setattr(updating, "DIVISIONS", 2)
        if not getattr(request.module, "TUNES", True):
            patch.setattr(baselines, "MIN_TUNED", 10**9)
        patch.setitem(report.PAGES.globals, "today", lambda: "2026-01-31")
        patch.setattr(Figure, "savefig", DRAW if figures else save_blank)
        if pages and not getattr(request.module, "REPORTS", False):
            patch.setattr(pages, "build_topics", lambda *_: [])
            patch.setattr(pages, "write_report", lambda path, *_, **__: path.touch())
        yield


@contextlib.contextmanager
def whole_reports():
    """Let runs write their reports."""
    from medgemma_clinical.commands import pages
    from medgemma_clinical.evaluation import report

    whole = {name: getattr(report, name) for name in ("build_topics", "write_report")}
    with mock.patch.multiple(pages, **whole):
        yield


@pytest.fixture
def figures(monkeypatch):
    """Draw the figures of one test."""
    monkeypatch.setattr(Figure, "savefig", DRAW)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Call each test slow that needs trained runs."""
    for item in items:
        if "runs" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter):
    """Say in CI that no browser has looked at the pages."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [each.longrepr[2] for each in skipped if "browser" in each.keywords]
    if os.environ.get("CI") and reasons:
        terminalreporter.write_line(f"CI: {len(reasons)} browser tests skipped. {reasons[0]}")


@pytest.fixture
def assert_approved(request):
    """Compare a text with ``approved/NAME.txt`` or the file at a path; ``--approve`` writes it."""

    def compare(name, text):
        path = name if isinstance(name, Path) else APPROVED / f"{name}.txt"
        if request.config.getoption("approve"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), "pytest --approve accepts a change"

    return compare


def sign_table(rows, seed, *, shuffled=False):
    """Series whose label copies the sign of the last value, or has nothing to do with it."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(rows):
        times = np.sort(rng.uniform(0, 48, size=rng.integers(2, 6))).round(1)
        values = rng.integers(1, 13, size=len(times)) * rng.choice([-1, 1], size=len(times))
        texts.append(" -> ".join(f"{v} ({t}h)" for v, t in zip(values, times, strict=True)))
        labels.append(int(values[-1] > 0))
    if shuffled:
        labels = rng.permutation(labels).tolist()
    return pd.DataFrame({"clinical_trajectory": texts, "label_escalation": labels})


@pytest.fixture(scope="session")
def dka_file(tmp_path_factory):
    """The first 160 sample stays in the user's two-column format."""
    table = pd.read_csv(SAMPLE, nrows=160)
    path = tmp_path_factory.mktemp("data") / "dka_training_data.csv"
    table[["clinical_trajectory", "label_escalation"]].to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def table():
    """100 stays of the sample data, their ids apart from their patients, one out of time order.

    Names of patients and contexts hold ``MARKER``, and the row ``MARKED`` the ``VALUES``.
    """
    from predicting import MARKED, MARKER, SERIES, VALUES

    table = pd.read_csv(SAMPLE, nrows=100, dtype=str)
    table.insert(1, "id", [f"row {k}" for k in range(len(table))])
    table["subject_id"] = f"{MARKER}p" + table["subject_id"]
    table["clinical_context"] += f", {MARKER}"
    table.loc[5, SERIES] = " -> ".join(reversed(table.loc[5, SERIES].split(" -> ")))
    table.loc[MARKED, SERIES] += " -> {} ({}h)".format(*VALUES)
    return table


@pytest.fixture(scope="session")
def runs(table, tmp_path_factory):
    """A folder with a run of each stage on a small model, trained once for all workers.

    No test changes it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / "shared_runs", root / "shared_runs.done"
    with FileLock(root / "shared_runs.lock"):
        if not done.exists():
            train_all(table, folder)
            done.touch()
    return folder


def train_all(table, folder):
    """Train each stage by the command line, the first with figures."""
    import medgemma_trainer as trainer  # not for tests that need no model
    from language_models import TINY_MODEL
    from medgemma_clinical.evaluation import decision, metrics
    from predicting import STAGES, write_data

    folder.mkdir(exist_ok=True)
    data = write_data(table, folder / "train.csv")
    words = ["--data_path", str(data), "--output_dir", str(folder), "--log_file", "none"]
    words += ["--batch_size", "8", "--encoder_lr", "0.05"]
    text = ["--model_name", TINY_MODEL, "--epochs", "2", "--adapter_lr", "0.01", "--ode_checkpoint"]
    text += [str(folder / "medgemma_trajectory_best.pt")]
    weight = mock.patch.object(decision, "fit_residual_weight", return_value=1.0)  # 0 hides faults
    draws = mock.patch.object(metrics, "REPLICATES", DRAWS)
    with draws, weight, whole_reports():
        with mock.patch.object(Figure, "savefig", DRAW):
            assert trainer.main(["--trajectory_only", "--trajectory_epochs", "3", *words]) == 0
        for mode in STAGES[1:]:
            assert trainer.main(["--mode", mode, *text, *words]) == 0
