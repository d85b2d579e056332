"""``predict --aggregate`` and ``pool``: files of sites, and what is refused."""

import json
import re
import stat
from dataclasses import replace

import pandas as pd
import pytest

import medgemma_trainer as trainer
from cohorts import waiting
from conftest import SAMPLE
from language_models import TINY_MODEL
from medgemma_clinical.commands import pool
from medgemma_clinical.evaluation.aggregate import aggregate
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES
from medgemma_clinical.files import locked
from medgemma_clinical.inference.hub import save_model, shared_copy
from pages import make_rows
from predicting import SERIES, command, predicted, refused, write_data
from site_files import make_site, parts

pytestmark = pytest.mark.slow

LABEL = "label_escalation"
STAGE = STAGE_NAMES["trajectory"]
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def strangers():
    """450 further stays, none of which trained a model of ``runs``, and with more events."""
    rows = pd.read_csv(SAMPLE, dtype=str).iloc[200:650].reset_index(drop=True)
    rows["subject_id"] = "MARKERp" + rows["subject_id"]
    rows.loc[::3, LABEL] = "1"
    return rows


@pytest.fixture
def model(runs):
    return runs / "trajectory"


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
        assert [line["name"] for line in content["models"]] == [STAGE, "blend with statics"]
        assert str(tmp_path) not in text
        assert path.stem not in text
        assert not re.search(r"\b(19|20)\d\d-\d\d|\d\d:\d\d", text), "no date"
        assert "MARKER" not in text
        for cell in rows[SERIES]:
            assert cell not in text
    capsys.readouterr()
    for _ in range(2):
        words = ["pool", *map(str, paths), "--output_dir", str(tmp_path / "pooled")]
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


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--primary", "last value"], [STAGE, "last value"]),
        (["--use", "ensemble"], [ENSEMBLE, "blend with statics"]),
        (["--use", "last_value", "--primary", "last value"], ["last value", STAGE]),
    ],
)
def test_an_aggregate_holds_the_used_model_and_its_planned_comparison(
    flags, names, model, strangers, tmp_path
):
    content = json.loads(aggregated(model, strangers.iloc[:150], tmp_path / "x.json", *flags))
    stage, *_ = trainer.TrajectoryModel.from_pretrained(model).trained.identity().values()
    lines = {line["name"]: line["sha256"] for line in content["models"]}
    assert [*lines] == names
    assert all((digest == stage) == (name == STAGE) for name, digest in lines.items())


def test_few_patients_are_refused(model, strangers, tmp_path, capsys):
    labels = strangers[LABEL] == "1"
    few = pd.concat([strangers[labels].iloc[:20], strangers[~labels].iloc[:80]])
    data, out, path = (tmp_path / name for name in ("few.csv", "out.csv", "x.json"))
    words = command(model, data, out, "--aggregate", str(path))
    for rows in (few.iloc[1:], few.iloc[:-1], few.drop(columns=LABEL), few.assign(**{LABEL: "0"})):
        write_data(rows, data)
        assert refused(capsys, words, "--aggregate", str(path))
        assert out.exists()
        assert not path.exists()
    write_data(few, data)
    assert trainer.main(words) == 0


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    """A model of times to events."""
    folder = tmp_path_factory.mktemp("times") / "run"
    options = {"trajectory_epochs": 1, "horizon_hours": [24, 72], "batch_size": 32}
    trainer.fit_trajectory(waiting(600), output_dir=folder, **options)
    return folder / "trajectory"


def test_aggregates_of_times_hold_the_label_at_the_horizon_of_rows_where_it_is_known(
    times, tmp_path, capsys
):
    paths = [tmp_path / f"{name}.json" for name in ("north", "south")]
    data = tmp_path / "rows.csv"
    for seed, path in enumerate(paths, 1):
        rows, out = waiting(300, seed), tmp_path / "out.csv"
        rows.to_csv(data, index=False)
        found = predicted(times, data, out, "--aggregate", str(path))
        content = json.loads(path.read_text())
        case = (rows["event"] == 1) & (rows["event_hours"] <= 24)
        is_known = (rows["event"] > 0) | (rows["event_hours"] >= 24)
        assert 0 < is_known.mean() < 1
        assert "24h" in content.pop("target")
        unknown = content.pop("unknown")
        assert unknown == pytest.approx(round(20 * (1 - is_known.mean())) / 20), "no count"
        assert f"{100 * unknown:.2g} %" in capsys.readouterr().out
        columns = {STAGE: "probability", "blend": "risk_24h_blend"}
        names = [line["name"] for line in content["models"]]
        columns = {name: columns[name] for name in names}
        table = pd.DataFrame({name: found[column] for name, column in columns.items()})
        table = table.assign(label=case.astype(int), patient=rows["subject_id"])[is_known]
        hashes = {line["name"]: line["sha256"] for line in content["models"]}
        for key, value in aggregate(table, hashes).items():
            assert content[key] == value
    words = ["pool", *map(str, paths), "--output_dir", str(tmp_path / "pooled")]
    assert trainer.main(words) == 0
    few = waiting(300, 3).assign(event_hours=5.0, event=0)  # all left before the horizon
    few.loc[:110, "event"] = 1
    few.to_csv(data, index=False)
    path = tmp_path / "few.json"
    words = command(times, data, out, "--aggregate", str(path))
    assert refused(capsys, words, "--aggregate")
    assert not path.exists()


@pytest.mark.parametrize("flag", ["--predictions", "--aggregate"])
@pytest.mark.parametrize("name", ["north.csv", "north.csv.gz"])
def test_no_output_takes_the_name_of_the_rows_or_of_their_description(
    flag, name, model, strangers, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / name
    strangers.head(20).to_csv(data, index=False)
    (tmp_path / "link").symlink_to(tmp_path)
    for other in ("north.json", str(tmp_path / "link" / "north.json"), name, "missing/x.json"):
        words = command(model, data, tmp_path / "out.csv", flag, other)
        assert refused(capsys, words, f"{flag} {other}")
        assert not (tmp_path / "north.json").exists()
    if flag != "--predictions":
        assert refused(capsys, command(model, data, tmp_path / "out.csv", flag, "out.csv"), flag)


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
    for key in ("multiplier", "shift", "threshold"):
        rule = {**trained.config["decision"]["label"], key: 0.123}
        config = {**trained.config, "decision": {"label": rule}}
        moved = replace(trained, config=config).identity()
        assert (moved["sha256"] == first["sha256"]) == (key == "threshold")
    rules = {**trained.config["models"], ENSEMBLE: {"label": {**rule, "multiplier": 0.123}}}
    moved = replace(trained, config={**trained.config, "models": rules}).identity()
    assert moved["sha256"] == first["sha256"]
    assert moved["baselines_sha256"] != first["baselines_sha256"]


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
    "no models": (("models",), []),
    "models of no form": (("models",), {"auroc": [DEEP]}),
    "a model twice": (("models", 1, "name"), STAGE),
    "an AUROC of 2": (("models", 0, "auroc"), 2),
    "a text for a number": (("models", 0, "slope"), "<script>"),
    "an error of 0": (("models", 0, "oe_error"), 0),
    "an endless number": (("models", 0, "slope_error"), float("inf")),
    "a long name": (("outcome",), "x" * 20_000),
    "a list for a hash": (("models", 1, "sha256"), ["x"]),
    "a negative count": (("events",), -5),
    "a count of text": (("patients",), "200"),
    "more events than patients": (("events",), 100_000),
    "more patients than of both kinds": (("patients",), 400),
    "few patients": (("patients",), 95),
    "few events": (("events",), 15),
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
    words = ["pool", str(first), str(bad), "--output_dir", str(tmp_path / "pooled")]
    assert refused(capsys, words, "pool", str(bad))
    assert not (tmp_path / "pooled").exists()


@pytest.mark.parametrize("case", ["another model", "another outcome", "twice", "one name", "alone"])
def test_sites_of_several_models_or_a_site_twice_are_refused(case, contents, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    first, second = tmp_path / "a.json", tmp_path / "b" / ("a" if case == "one name" else "c")
    second = second.with_suffix(".json")
    first.write_text(json.dumps(contents[0]))
    place = {"another model": ("models", 0, "sha256"), "another outcome": ("outcome",)}
    content = contents[0 if case == "twice" else 1]
    second.write_text(damage(content, *place.get(case, ("version",)), value="2" * 64))
    paths = [first] if case == "alone" else [first, second]
    words = ["pool", *map(str, paths), "--output_dir", str(tmp_path / "pooled")]
    assert refused(capsys, words, *([] if case == "alone" else [second]))
    assert not (tmp_path / "pooled").exists()


def test_two_at_once_do_not_write_into_one_folder(contents, tmp_path, capsys):
    paths = [tmp_path / f"{name}.json" for name in "ab"]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    folder = tmp_path / "pooled"
    words = ["pool", *map(str, paths), "--output_dir", str(folder)]
    assert trainer.main(words) == 0
    with locked(folder / "sites.html"):
        assert refused(capsys, words, folder)
    assert not list(folder.glob("*.1.*"))
    assert trainer.main(words) == 0
