"""How the training data were made: told to Python by ``description=``, kept, shared, made again."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

import dataset_format
import medgemma_trainer
from conftest import whole_reports
from dataset_format import Description, MIMICtrajectoryDataset, read_description
from medgemma_clinical.files import InputError
from medgemma_trainer import (
    TrajectoryClassifier,
    TrajectoryModel,
    cross_validate,
    fit_classification,
    fit_trajectory,
)
from pages import Page
from srtr_files import synthetic_tables, write_folder

pytestmark = pytest.mark.slow

NAMES = ("Laktat", "mmol/l", "Hospital death")
RARE = ("zorp", "quux", "nadirin", "blip", "divers")
"""Categories and items of fewer than eleven patients."""

FLAGS = ["--prediction_time=admitted + 24 h", "--outcome=Hospital death", "--window_hours=20"]
FLAGS += ["--series=Laktat [mmol/l]=LAC1", "--series=Laktat [mmol/l]=LAC2"]
FLAGS += ["--series=Kalium [mmol/l]=KAL", "--series=nadirin [u]=NAD"]
FLAGS += [f"--static={name}={name}" for name in ("age", "sex", "race", "smoker", "kin", "note")]


def write_tables(folder, n, seed):
    """Write a hospital's tables; of each column of words but smoker one word is rare."""
    rng, hour = np.random.default_rng(seed), pd.Timedelta(hours=1)
    admitted = pd.Timestamp("2024-01-01 08:00") + 3 * hour * np.arange(n)
    risk = rng.normal(size=n)
    common = {
        "race": [*"abc"],
        "kin": ["one"],
        "note": ["blip"],
        "sex": ["m", "w"],
        "smoker": ["ja", "nein"],
    }
    words = {name: rng.choice(texts, n).astype(object) for name, texts in common.items()}
    words["race"][:4], words["kin"][4:8], words["sex"][8:10] = "zorp", "quux", "divers"
    words["note"][10:] = "none"
    labels = pd.DataFrame({"subject_id": np.arange(n) + 1000 * seed, "admitted": admitted, **words})
    labels["age"] = rng.integers(20, 90, n)
    labels["label"] = (risk + rng.normal(size=n) > 0.8).astype(int)
    items = np.where(np.arange(n) % 2, "LAC1", "LAC2")
    values = [
        labels[["subject_id"]].assign(
            time=admitted + at * hour,
            item=item,
            value=(level + risk / 2 + rng.normal(size=n) / 5).round(2),
            unit=unit,
        )[:count]
        for at in (6, 12, 20)
        for item, level, unit, count in (
            *((items, 3, "mmol/l", n), ("KAL", 4, "mmol/l", n), ("NAD", 9, "u", 5)),
        )
    ]
    paths = folder / f"labs{seed}.csv", folder / f"people{seed}.csv"
    for table, path in zip((pd.concat(values), labels), paths, strict=True):
        table.to_csv(path, index=False)
    return [f"--table={paths[0]}", f"--labels={paths[1]}"]


def from_long(*words):
    return dataset_format.main(["from_long", *map(str, words)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file of from_long, without storetime, and its description beside it."""
    folder = tmp_path_factory.mktemp("made")
    assert from_long(*write_tables(folder, 160, 1), *FLAGS, f"--out={folder / 'mort.csv'}") == 0
    return folder / "mort.csv"


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """A run folder of a table and the path of its description."""
    folder, path = tmp_path_factory.mktemp("run"), made.with_suffix(".json")
    table = pd.read_csv(made)
    with whole_reports():
        fit_trajectory(table, description=path, trajectory_epochs=2, output_dir=str(folder))
    return folder / "trajectory"


@pytest.fixture(scope="module")
def shared(run, tmp_path_factory):
    """A copy to be given away."""
    folder = tmp_path_factory.mktemp("shared") / "model"
    TrajectoryModel.from_pretrained(run).save_shared(folder)
    return folder


def forms(path):
    content = json.loads(path.with_suffix(".json").read_text())
    return {
        "dict": content,
        "json": str(path.with_suffix(".json")),
        "csv": path,
        "object": read_description(path),
    }


def names_of(model):
    config = model.config
    return config["features"][0], config["units"][0], config["outcome"]


# ------------------------------------------------------------------ description=


@pytest.mark.parametrize("form", ["dict", "json", "csv", "object"])
def test_a_table_with_its_description_has_its_names_and_no_warning(form, made, run, caplog):
    caplog.set_level(logging.INFO)
    table, about = pd.read_csv(made), forms(made)[form]
    estimator = TrajectoryClassifier(trajectory_epochs=1, description=about).fit(table)
    model = fit_trajectory(table, description=about, trajectory_epochs=1, test=False)
    assert names_of(estimator.model_) == names_of(model) == NAMES
    of_run, new = TrajectoryModel.from_pretrained(run), table.drop(columns="label_escalation")
    expected = of_run.predict_proba(new)
    for rows in (table, new):
        np.testing.assert_array_equal(of_run.predict_proba(rows, description=about), expected)
    assert "no description" not in caplog.text
    warnings = [x.getMessage() for x in caplog.records if x.levelno > logging.INFO]
    assert not [text for text in warnings if "is not read: fewer than" not in text]


def test_the_page_of_a_table_with_its_description_has_its_names(run):
    text = Page((run / "report.html").read_text()).text
    assert "Hospital death" in text
    assert "Laktat (mmol/l)" in text
    for word in ("nion gap", "scalation", "etoacidosis", "DKA format"):
        assert word not in text


def test_the_page_of_a_table_without_description_names_no_disease(made, tmp_path):
    table = pd.read_csv(made)
    with whole_reports():
        fit_trajectory(table, trajectory_epochs=1, output_dir=str(tmp_path))
    text = Page((tmp_path / "trajectory" / "report.html").read_text()).text
    assert "Main series" in text
    assert "Outcome" in text
    for word in ("nion gap", "mEq/L", "scalation", "etoacidosis", "DKA format"):
        assert word not in text


def test_the_estimators_description_survives_scikit_learn(made, caplog):
    table, about = pd.read_csv(made), forms(made)
    for given in about.values():
        estimator = clone(TrajectoryClassifier(trajectory_epochs=1, description=given))
        assert estimator.get_params()["description"] == given
        other = TrajectoryClassifier().set_params(**estimator.get_params())
        assert other.description == given
    search = GridSearchCV(estimator, {"members": [1, 2]}, scoring="roc_auc", cv=2)
    best = search.fit(table, table["label_escalation"]).best_estimator_
    assert names_of(best.model_) == NAMES
    assert "no description" not in caplog.text


def test_every_function_that_takes_data_takes_a_description(made, run, caplog):
    table, path = pd.read_csv(made), made.with_suffix(".json")
    options = {"model_name": "demo", "epochs": 1, "baselines": False}
    stage_2 = fit_classification(table, run, description=path, **options)
    assert names_of(stage_2) == NAMES
    found = cross_validate(table, 2, description=path, trajectory_epochs=1)
    assert len(found.predictions) == len(table)
    assert "no description" not in caplog.text
    wrong = {**forms(made)["dict"], "unit": "mg/dl"}
    model = TrajectoryModel.from_pretrained(run)
    methods = ("predict_proba", "predict", "predictions", "risk_over_time", "plot_risk")
    for name in (*methods, "plot_patient"):
        with pytest.raises(InputError, match="mg/dl"):
            getattr(model, name)(table, description=wrong)
    with pytest.raises(InputError, match="mg/dl"):
        stage_2.prompt_embeds(table, description=wrong)


def test_data_that_need_no_description_refuse_one(made, run, tmp_path):
    dataset = MIMICtrajectoryDataset(made)
    model = TrajectoryModel.from_pretrained(run)
    for function in (fit_trajectory, model.predict_proba):
        with pytest.raises(InputError, match="leave description out"):
            function(dataset, description=Description())
    folder = write_folder(tmp_path, *synthetic_tables("kidney"), "kidney")
    with pytest.raises(InputError, match="leave it out"):
        fit_trajectory(str(folder), dataset="srtr", description=Description())


def test_a_row_without_values_names_the_function_that_lists_it(made, run):
    table = pd.read_csv(made)
    empty = table.filter(regex="trajectory").columns
    table.loc[[0, 7], empty] = ""
    model = TrajectoryModel.from_pretrained(run)
    for function in (model.predict_proba, model.predict, model.risk_over_time):
        with pytest.raises(InputError, match=r"predictions\(rows\)"):
            function(table)
    found = model.predictions(table)
    assert (found.index[found["problem"] != ""] == [0, 7]).all()
    model.plot_patient(table)
    model.plot_patient(table, table["id"][3])
    with pytest.raises(InputError, match="row 7"):
        model.plot_patient(table, table["id"][7])


# ------------------------------------------------------------------ cards


def test_both_cards_say_when_and_from_which_items(run, shared):
    report = Page((run / "report.html").read_text()).text
    card = (shared / "README.md").read_text()
    facts = (shared / "model_facts.xml").read_text()
    for text in (report, card, facts):
        assert "admitted + 24 h" in text
        assert "20 hours up to the prediction time" in text
        assert "Laktat [mmol/l]: LAC1, LAC2; Kalium [mmol/l]: KAL" in text


def test_a_shared_model_makes_the_same_table_elsewhere(made, shared, tmp_path):
    tables = write_tables(tmp_path, 60, 2)
    expected = pd.read_csv(made)
    model = TrajectoryModel.from_pretrained(shared)
    for k, like in enumerate((shared, shared / "import", shared / "import.json")):
        out = tmp_path / f"b{k}.csv"
        assert from_long(*tables, f"--like={like}", f"--out={out}") == 0
        other = pd.read_csv(out)
        hidden = {"trajectory_nadirin [u]", "static_race zorp", "static_kin quux"}
        columns = {*expected} - hidden - {"static_note none"}
        assert {*other} == columns | {"static_race (other)"}
        again = json.loads(out.with_suffix(".json").read_text())["arguments"]
        first = json.loads(made.with_suffix(".json").read_text())["arguments"]
        same = {*first} - {"series", "static", "read_as"}
        assert {name: again[name] for name in same} == {name: first[name] for name in same}
        assert np.isfinite(model.predict_proba(out)).all()
    from_all = tmp_path / "all.csv"
    assert from_long(*tables, f"--like={made.with_suffix('.json')}", f"--out={from_all}") == 0
    assert [*pd.read_csv(from_all)] == [*expected]
    read = [name for name in model.config["inputs"]["static"] if name in other]
    known = ~other["static_race a"].isna()  # the rare category is unknown there
    whole = pd.read_csv(from_all)
    pd.testing.assert_frame_equal(other[known][read], whole[known][read], check_dtype=False)


def test_a_shared_recipe_tells_of_no_few_patients(made, run, shared):
    content = json.loads((shared / "import.json").read_text())
    assert {*content} == {"made_by", "arguments"}
    names = {*json.loads(made.with_suffix(".json").read_text())["arguments"]}
    assert {*content["arguments"]} == names
    text = (shared / "import.json").read_text() + (shared / "README.md").read_text()
    text += json.dumps(TrajectoryModel.from_pretrained(shared).config["recipe"])
    assert not [word for word in (*RARE, "sha256", "removed") if word in text]
    assert all(word in json.dumps(TrajectoryModel.from_pretrained(run).config) for word in RARE[:2])
    assert str(Path(made).parent) not in text
    words = content["arguments"]["read_as"]["static"]
    assert words["race"] == ["(other)", *"abc"]
    assert {*words} == {"age", "race", "sex", "smoker"}
    assert content["arguments"]["static"] == [f"{name}={name}" for name in words]
    assert words["sex"] == ["male", "female"]
    assert words["age"] == []


def test_a_saved_copy_of_ones_own_shares_no_more(run, tmp_path):
    for _ in range(2):  # the second one replaces the first
        TrajectoryModel.from_pretrained(run).save_pretrained(tmp_path / "own")
    text = (tmp_path / "own" / "import.json").read_text()
    assert not [word for word in RARE if word in text]


def test_a_table_that_no_command_made_has_no_recipe(made, tmp_path):
    table = pd.read_csv(made)
    about = {"series": "L", "unit": "", "outcome": "D", "made_by": "me", "arguments": {"series": 5}}
    model = fit_trajectory(table, description=about, trajectory_epochs=1, baselines=False)
    model.save_shared(tmp_path / "model")
    assert not (tmp_path / "model" / "import.json").exists()
    assert from_long(*write_tables(tmp_path, 9, 3), f"--like={tmp_path / 'model'}") == 2


def test_the_command_trains_the_same_recipe(made, run, tmp_path):
    words = ["--trajectory_only", f"--data_path={made}", "--trajectory_epochs=2"]
    assert medgemma_trainer.main([*words, f"--output_dir={tmp_path}", "--log_file=none"]) == 0
    configs = [
        TrajectoryModel.from_pretrained(path).config for path in (run, tmp_path / "trajectory")
    ]
    assert configs[0]["recipe"] == configs[1]["recipe"]
    assert configs[0]["timing"] == configs[1]["timing"]
