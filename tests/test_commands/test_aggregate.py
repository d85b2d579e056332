"""``--predict --aggregate`` and ``--pool``: files of sites, their ledger, and what is refused."""

import json
import re
import stat
from dataclasses import replace

import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import SAMPLE
from language_models import TINY_MODEL
from medgemma_clinical.commands import pool
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.hub import save_model, shared_copy
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.outcome import LabelOutcome
from pages import make_rows
from predicting import SERIES, command, predicted, refused, write_data
from site_files import make_site, parts

LABEL = "label_escalation"
STAGE = STAGE_NAMES["trajectory"]
REFERENCE = {"patients": 500, "intercept": 0.0, "slope": 1.0}
REFERENCE |= {"covariance": [[0.02, 0.01], [0.01, 0.01]]}
LEDGER = f"{TRAJECTORY_FILE}.aggregates.json"
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def strangers():
    """450 further stays, none of which trained a model of ``runs``, and with more events."""
    rows = pd.read_csv(SAMPLE, dtype=str).iloc[200:650].reset_index(drop=True)
    rows["subject_id"] = "MARKERp" + rows["subject_id"]
    rows.loc[::3, LABEL] = "1"
    return rows


@pytest.fixture
def model(runs, tmp_path):
    """Return a copy of stage 1, whose ledger no other test writes."""
    trained = trainer.TrajectoryModel.from_pretrained(runs / "trajectory").trained
    reference = {STAGE: REFERENCE | {"edges": [0.05, 0.08, 0.1, 0.12, 0.2]}}
    config = {**trained.config, "reference": reference}
    save_model(replace(trained, config=config), tmp_path / "model")
    return tmp_path / "model"


def aggregated(model, rows, path, *flags):
    """Write the aggregate of some rows and return its text."""
    data = write_data(rows, path.with_suffix(".rows.csv"))
    predicted(model, data, path.with_suffix(".csv"), "--aggregate", str(path), *flags)
    return path.read_text()


def test_sites_give_aggregates_that_name_nobody_and_one_command_pools_them(
    model, strangers, tmp_path, capsys
):
    paths = [tmp_path / f"{name}.json" for name in ("north", "south", "west")]
    for k, path in enumerate(paths):
        rows = strangers.iloc[150 * k : 150 * (k + 1)]
        text = aggregated(model, rows, path)
        content = json.loads(text)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert content["patients"] == 150
        assert content["events"] % 5 == 0
        names = {line["model"] for line in content["metrics"]}
        assert {STAGE, ENSEMBLE, "blend with statics"} <= names
        assert content["groups"]
        assert str(tmp_path) not in text
        assert path.stem not in text
        assert not re.search(r"\b(19|20)\d\d-\d\d|\d\d:\d\d", text), "no date"
        assert "MARKER" not in text
        for cell in rows[SERIES]:
            assert cell not in text
    ledger = model / LEDGER
    assert stat.S_IMODE(ledger.stat().st_mode) == 0o600
    assert "MARKER" not in ledger.read_text()
    capsys.readouterr()
    for _ in range(2):
        words = ["--pool", *map(str, paths), "--output_dir", str(tmp_path / "pooled")]
        assert trainer.main(words) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "pooled" / "sites.json").read_text())
    (auroc,) = (x for x in results["pooled"] if (x["model"], x["metric"]) == (STAGE, "auroc"))
    assert f"{auroc['value']:.3f}"[:-1] in shown
    assert auroc["sites"] == 3
    assert {line["site"] for line in results["sites"]} == {"north", "south", "west"}
    page = (tmp_path / "pooled" / "sites.html").read_text()
    assert str(tmp_path) not in page
    assert (tmp_path / "pooled" / "sites.1.html").exists(), "earlier results are moved aside"


def changed(rows, how):
    """Return rows of which a few are other ones, or the same rows in other words."""
    rows = rows.copy()
    if how == "5 fewer":
        return rows.iloc[5:]
    if how == "5 labels":
        rows.loc[rows.index[:5], LABEL] = "1"
        rows.loc[rows.index[5:10], LABEL] = "0"
        return rows
    rows["subject_id"] = [f"new {k}" for k in range(len(rows))]
    if how == "5 fewer by other names":
        return rows.iloc[5:]
    return rows.sample(frac=1, random_state=0)


@pytest.mark.parametrize(
    "how", ["5 fewer", "5 labels", "5 fewer by other names", "the same by other names"]
)
def test_rows_that_differ_in_few_patients_give_no_second_aggregate(
    how, model, strangers, tmp_path, capsys
):
    rows = strangers.iloc[:150].copy()
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    text = aggregated(model, rows, first)
    assert aggregated(model, rows, second) == text, "equal rows may be given again"
    known = (model / LEDGER).read_bytes()
    new = changed(rows, how)
    third = tmp_path / "third.json"
    data, out = write_data(new, tmp_path / "new.csv"), tmp_path / "out.csv"
    words = command(model, data, out, "--aggregate", str(third))
    if how == "the same by other names":
        assert trainer.main(words) == 0
        return
    assert refused(capsys, words, "--aggregate", str(third))
    assert not third.exists()
    assert out.exists(), "the predictions do not need it"
    assert (model / LEDGER).read_bytes() == known
    assert not list(tmp_path.rglob("*.partial"))
    assert trainer.main([*words, "--min_cell", "0"]) == 0, "asked for by name"
    assert (model / LEDGER).read_bytes() != known


def test_few_patients_times_and_a_damaged_ledger_are_refused(
    model, strangers, tmp_path, capsys, monkeypatch
):
    labels = strangers[LABEL] == "1"
    few = pd.concat([strangers[labels].iloc[:12], strangers[~labels].iloc[:30]])
    data, out, path = (
        write_data(few, tmp_path / "few.csv"),
        tmp_path / "out.csv",
        tmp_path / "x.json",
    )
    words = command(model, data, out, "--aggregate", str(path))
    for rows in (few.iloc[3:], few.drop(columns=LABEL), few.assign(**{LABEL: "0"})):
        write_data(rows, data)
        assert refused(capsys, words, "--aggregate", str(path))
        assert out.exists()
        assert not path.exists()
        assert not (model / LEDGER).exists()
    write_data(few, data)
    assert refused(capsys, [*words, "--min_cell", "13"], "13 new patients")
    (model / LEDGER).write_text(DEEP)
    assert refused(capsys, words, LEDGER)
    assert not path.exists()
    for other in (out, data, data.with_suffix(".json"), tmp_path / "missing" / "x.json"):
        assert refused(capsys, command(model, data, out, "--aggregate", str(other)), "--aggregate")
    zipped = tmp_path / "few.csv.gz"
    few.to_csv(zipped, index=False)
    beside = command(model, zipped, out, "--aggregate", str(data.with_suffix(".json")))
    assert refused(capsys, beside, "--aggregate")
    monkeypatch.setattr(LabelOutcome, "has_curves", True)
    assert refused(capsys, words, "--aggregate")


@pytest.mark.parametrize("stage", ["trajectory", "classification"])
def test_copies_of_a_model_are_one_model_and_an_update_is_another(stage, runs, tmp_path):
    trained = trainer.TrajectoryModel.from_pretrained(runs / stage).trained
    first = trained.identity()
    assert all(first.values())
    base = {"model_name": TINY_MODEL} if stage == "classification" else {}
    save_model(trained, tmp_path / "saved")
    shared_copy(trained, tmp_path / "shared")
    saved, shared = (
        trainer.TrajectoryModel.from_pretrained(tmp_path / name, **base).trained.identity()
        for name in ("saved", "shared")
    )
    assert saved == shared == first, "whose words a copy lacks"
    for key in ("slope", "intercept", "threshold"):
        rule = {**trained.config["decision"], key: 0.123}
        moved = replace(trained, config={**trained.config, "decision": rule}).identity()
        assert (moved["sha256"] == first["sha256"]) == (key == "threshold")
    rules = {**trained.config["models"], ENSEMBLE: {**rule, "slope": 0.123}}
    moved = replace(trained, config={**trained.config, "models": rules}).identity()
    assert moved["sha256"] == first["sha256"]
    assert moved["baselines_sha256"] != first["baselines_sha256"]


def test_no_model_is_written_over_a_ledger(model, runs):
    (model / LEDGER).write_text("{}")
    trained = trainer.TrajectoryModel.from_pretrained(runs / "trajectory").trained
    with pytest.raises(InputError, match="other files"):
        save_model(trained, model)
    assert (model / LEDGER).exists()


# --------------------------------------------------------------------------- pool


@pytest.fixture(scope="module")
def contents():
    """The contents of two files of sites."""
    return [make_site(part) for part in parts(make_rows(400), (200, 200))]


def damage(content, *path, value):
    """Return a copy of a content in which one thing is another."""
    copy = json.loads(json.dumps(content))
    part = copy
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    return json.dumps(copy)


HOSTILE = {
    "another format": (("format",), 99),
    "no metrics": (("metrics",), []),
    "metrics of no form": (("metrics",), {"auroc": [DEEP]}),
    "an unknown metric": (("metrics", 0, "metric"), "f1"),
    "a metric twice": (("metrics", 0, "metric"), "auprc"),
    "an AUROC of 2": (("metrics", 0, "value"), 2),
    "a text for a number": (("metrics", 0, "value"), "<script>"),
    "a variance of 0": (("metrics", 0, "variance"), 0),
    "an endless number": (("metrics", 0, "variance"), float("inf")),
    "no such stage": (("model", "name"), "stage 9"),
    "a long name": (("model", "outcome"), "x" * 10_000),
    "a list for a hash": (("model", "baselines_sha256"), ["x"]),
    "a negative count": (("events",), -5),
    "a count of text": (("patients",), "200"),
    "a group outside": (("groups", 0, "risk"), -1),
    "groups of no form": (("groups",), 7),
    "a case mix of no form": (("case_mix", "series"), ["x"]),
    "quantiles of no form": (("case_mix", "series", "lactate", "levels"), [[0.5]]),
    "no case mix": (("case_mix",), None),
}


@pytest.mark.parametrize("case", [*HOSTILE, "deep", "half", "empty", "huge", "missing", "folder"])
def test_a_file_that_is_no_aggregate_is_refused_in_one_line(
    case, contents, tmp_path, capsys, monkeypatch
):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(contents[0]))
    text = json.dumps(contents[1])
    if case in HOSTILE:
        place, value = HOSTILE[case]
        bad.write_text(damage(contents[1], *place, value=value))
    elif case == "huge":
        monkeypatch.setattr(pool, "MAX_SIZE", len(text) - 1)
        bad.write_text(text)
        good.write_text("{}")
    elif case == "folder":
        bad.mkdir()
    elif case != "missing":
        bad.write_text({"deep": DEEP, "half": text[: len(text) // 2], "empty": ""}[case])
    first = good if case != "huge" else bad
    words = ["--pool", str(first), str(bad), "--output_dir", str(tmp_path / "pooled")]
    assert refused(capsys, words, "--pool", str(bad))
    assert not (tmp_path / "pooled").exists()


@pytest.mark.parametrize("case", ["another model", "another outcome", "twice", "one name", "alone"])
def test_sites_of_several_models_or_a_site_twice_are_refused(case, contents, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    first, second = tmp_path / "a.json", tmp_path / "b" / ("a" if case == "one name" else "c")
    second = second.with_suffix(".json")
    first.write_text(json.dumps(contents[0]))
    key = {"another model": "sha256", "another outcome": "outcome"}.get(case, "threshold")
    other = "2" * 64 if key != "threshold" else 0.3
    second.write_text(damage(contents[0 if case == "twice" else 1], "model", key, value=other))
    paths = [first] if case == "alone" else [first, second]
    words = ["--pool", *map(str, paths), "--output_dir", str(tmp_path / "pooled")]
    assert refused(capsys, words, *([] if case == "alone" else [second]))
    assert not (tmp_path / "pooled").exists()
