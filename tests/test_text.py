"""Text features in whole runs: what is added to stage 1, kept, predicted, explained, shared."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from conftest import whole_reports
from language_models import TINY_MODEL
from medgemma_clinical.commands import results
from medgemma_clinical.files import InputError
from medgemma_clinical.models.checkpoints import TEXT, TRAJECTORY_FILE
from medgemma_clinical.models.text_encoder import CACHE
from medgemma_trainer import TrajectoryClassifier, TrajectoryModel, main
from predicting import predicted, refused
from test_times import ABOUT, waiting

pytestmark = pytest.mark.slow

FINDINGS = {"vomiting": 2.0, "confused": 1.5, "eating well": -2.0}
ABOUT_X = {"series": "x", "unit": ""}
ALONE, WITH_TEXT = "words of the context", "regression with text"


def notes(n, seed):
    """Texts that affirm or deny findings, and what these add to the log-odds."""
    has = np.random.default_rng(seed).random((n, 3)) < 0.4
    texts = [
        ". ".join(
            f"{'' if there else 'no '}{name}" for name, there in zip(FINDINGS, row, strict=True)
        )
        for row in has
    ]
    return texts, has @ np.array([*FINDINGS.values()]) - 1


def table(n=600, seed=0):
    rng = np.random.default_rng(seed)
    last, (texts, odds) = rng.normal(20, 5, n), notes(n, seed)
    return pd.DataFrame(
        {
            "subject_id": [f"p{seed}-{k}" for k in range(n)],
            "clinical_trajectory": [f"20 (0h) -> {x:.1f} (6h)" for x in last],
            "clinical_context": texts,
            "label_escalation": (odds + rng.logistic(size=n) > 0).astype(int),
        }
    )


def train(folder, data, *words):
    arguments = ["--trajectory_only", "--data_path", data, "--output_dir", folder]
    arguments += ["--trajectory_epochs", 2, "--log_file", "none", *words]
    with whole_reports():
        return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "data.csv"
    table().to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def words(data):
    folder = data.parent / "words"
    assert train(folder, data, "--text_features", "words") == 0
    return folder


@pytest.fixture(scope="module")
def frozen(data):
    folder = data.parent / "frozen"
    assert train(folder, data, "--text_features", "frozen", "--text_model", TINY_MODEL) == 0
    return folder


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    folder = tmp_path_factory.mktemp("times")
    rows = waiting()
    rows["clinical_context"], odds = notes(len(rows), 0)
    ends = np.random.default_rng(5).exponential(60 * np.exp(-odds))
    first = ends < rows["event_hours"]
    rows.loc[first, "event_hours"] = ends[first].round(1)
    rows.loc[first, "event"] = 1
    rows.to_csv(folder / "waiting.csv", index=False)
    (folder / "waiting.json").write_text(json.dumps(ABOUT))
    more = ["--horizon_hours", "24,72", "--text_features", "words"]
    assert train(folder, folder / "waiting.csv", *more) == 0
    return folder


@pytest.fixture(params=["words", "frozen", "times"])
def run(request):
    return request.getfixturevalue(request.param)


def data_of(run):
    return run / "waiting.csv" if run.name.startswith("times") else run.parent / "data.csv"


def metrics(run):
    return json.loads((run / "trajectory" / "metrics.json").read_text())


# ------------------------------------------------------------------ what is learned


def test_text_is_added_to_stage_1_and_read_by_a_regression(run):
    assert metrics(run)["residual_weight"] > 0.3
    tested = pd.read_csv(run / "trajectory" / "predictions_test.csv")
    alone = "frozen text" if run.name == "frozen" else ALONE
    event = tested["label"] if "label" in tested else (tested["event"] == 1).astype(int)
    own = "probability" if "label" in tested else "risk_24h"
    ending = "" if "label" in tested else " risk_24h"
    for risk in (own, *(f"{model}{ending}" for model in (alone, WITH_TEXT, "ensemble"))):
        assert auroc(tested[risk], event) > 0.6, risk


def auroc(risk, event):
    ranks, events = risk.rank()[event == 1].sum(), event.sum()
    return (ranks - events * (events + 1) / 2) / (events * (len(event) - events))


def test_a_model_predicts_what_its_test_showed(run, tmp_path):
    tested = pd.read_csv(run / "trajectory" / "predictions_test.csv", dtype={"id": str})
    found = predicted(run / "trajectory", data_of(run), tmp_path / "out.csv").set_index("id")
    for column in ("probability", "risk_24h", "risk_72h"):
        if column in tested:
            expected = tested.set_index("id")[column]
            np.testing.assert_allclose(found.loc[expected.index, column], expected, atol=1e-6)


def test_a_model_with_text_is_compared_with_a_regression_that_reads_it(run):
    assert metrics(run)["test"]["primary"] == WITH_TEXT


def test_an_ablation_shows_the_regression_with_text_of_its_variants(data, tmp_path):
    variant = "stage 1 + words"
    words = ["--data_path", data, "--output_dir", tmp_path, "--trajectory_epochs", 2]
    words += ["--ablation", f"stage 1,{variant}", "--log_file", "none"]
    with whole_reports():
        assert main([*map(str, words)]) == 0
    content = json.loads((tmp_path / "ablation" / "ablation.json").read_text())["models"]
    names = [variant, f"{variant}, {WITH_TEXT}", f"{variant}, ensemble"]
    assert all(content[name]["auroc"]["difference"] > 0.05 for name in names)


def test_the_classifier_of_scikit_learn_reads_texts():
    own = TrajectoryClassifier(trajectory_epochs=2, text_features="words").fit(table())
    rows = table(300, seed=4)
    assert auroc(pd.Series(own.predict_proba(rows)[:, 1]), rows["label_escalation"]) > 0.7


def test_rows_without_a_text_are_counted(words, tmp_path, capsys):
    rows = tmp_path / "new.csv"
    table(20, seed=4).drop(columns="clinical_context").to_csv(rows, index=False)
    capsys.readouterr()
    predicted(words / "trajectory", rows, tmp_path / "out.csv")
    assert "20 rows lack a text" in " ".join(capsys.readouterr().out.split())


def test_stage_2_has_the_regression_with_text_beside_it(data, tmp_path):
    line = ["--data_path", data, "--soft_prompt", "off", "--series_text", "none", "--epochs", 1]
    line += ["--model_name", TINY_MODEL, "--output_dir", tmp_path, "--log_file", "none"]
    assert main([*map(str, line), "--text_features", "words"]) == 0
    content = json.loads((tmp_path / "classification" / "metrics.json").read_text())
    assert {ALONE, WITH_TEXT} <= content["test"]["models"].keys()
    assert "residual_weight" not in content


def test_risks_are_those_of_stage_1_and_the_weighted_text(words):
    model = TrajectoryModel.from_pretrained(words / "trajectory")
    rows = table(30, seed=3)
    whole = logit(model.predict_proba(rows)[:, 1])
    usual = rows.assign(clinical_context="")
    without = logit(model.predict_proba(usual)[:, 1])
    text, weight = model.trained.text, metrics(words)["residual_weight"]
    dataset = model.datasets["dka"](rows, description=ABOUT_X)
    numbers = text.numbers(dataset)[:, 0] - text.shift[0]  # an empty text holds no word
    np.testing.assert_allclose(whole - without, weight * numbers, atol=1e-5)


def test_blend_and_ensemble_count_text_once_in_full(words):
    model = TrajectoryModel.from_pretrained(words / "trajectory")
    found = model.predictions(table(30, seed=3))
    text, weight = model.trained.text, metrics(words)["residual_weight"]
    dataset = model.datasets["dka"](table(30, seed=3), description=ABOUT_X)
    share = weight * text.numbers(dataset)[:, 0]
    both = logit(found["probability"]) + logit(found["probability_blend"]) + share
    np.testing.assert_allclose(found["probability_ensemble"], expit(both / 2), rtol=1e-5)


# ------------------------------------------------------------------ leaks, and what is kept


def test_texts_of_the_test_part_teach_nothing(words, data, tmp_path):
    tested = pd.read_csv(words / "trajectory" / "predictions_test.csv", dtype={"id": str})
    rows = table()
    is_test = rows["subject_id"].isin(tested["patient"])
    assert is_test.sum() == len(tested) > 30
    rows.loc[is_test, "clinical_context"] = "words of a later day, vomiting"
    rows.to_csv(tmp_path / "data.csv", index=False)
    assert train(tmp_path, tmp_path / "data.csv", "--text_features", "words") == 0
    for name in (TEXT, "baselines.json"):
        before, after = (x / "trajectory" / name for x in (words, tmp_path))
        assert before.read_bytes() == after.read_bytes(), name
    assert metrics(words)["residual_weight"] == metrics(tmp_path)["residual_weight"]


def test_the_weight_is_chosen_by_a_regression_on_the_training_part_alone(
    data, tmp_path, monkeypatch
):
    seen, fit = [], results.fitted_text

    def spied(stage, data, settings, rows):
        seen.append(({*rows.tolist()}, data.split))
        return fit(stage, data, settings, rows)

    monkeypatch.setattr(results, "fitted_text", spied)
    assert train(tmp_path, data, "--text_features", "words", "--trajectory_epochs", 1) == 0
    (choosing, split), (kept, _) = seen
    assert choosing == {*split["train"].tolist()}
    assert kept == choosing | {*split["val"].tolist()}, "what has chosen then teaches"


def test_a_stage_1_without_its_text_is_refused_and_an_altered_one_too(words, tmp_path, capsys):
    rows = tmp_path / "new.csv"
    table(20, seed=4).to_csv(rows, index=False)
    alone = tmp_path / "alone" / TRAJECTORY_FILE
    alone.parent.mkdir()
    alone.write_bytes((words / TRAJECTORY_FILE).read_bytes())
    line = ["predict", "--data_path", rows, "--predictions", tmp_path / "o.csv", "--checkpoint"]
    assert refused(capsys, [*map(str, [*line, alone])], TEXT)
    content = json.loads((words / "trajectory" / TEXT).read_text())
    content["coefficients"][0][0] += 1
    (alone.parent / TEXT).write_text(json.dumps(content))
    assert refused(capsys, [*map(str, [*line, alone])], TEXT, "damaged")


def test_states_are_kept_in_the_run_and_read_by_the_same_encoder_alone(frozen, tmp_path, capsys):
    assert (frozen / CACHE).is_file()
    line = [
        "predict",
        "--data_path",
        frozen.parent / "data.csv",
        "--predictions",
        tmp_path / "o.csv",
    ]
    line += ["--checkpoint", frozen / "trajectory", "--text_model", "demo"]
    assert refused(capsys, [*map(str, line)], "--text_model")


def test_a_model_with_text_is_shared_when_asked_by_name_alone(run, tmp_path):
    model = TrajectoryModel.from_pretrained(run / "trajectory")
    with pytest.raises(InputError, match="share_text"):
        model.save_shared(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model.save_shared(tmp_path / "shared", share_text=True)
    shared = TrajectoryModel.from_pretrained(tmp_path / "shared", text_model=TINY_MODEL)
    rows = pd.read_csv(data_of(run), nrows=30)
    np.testing.assert_array_equal(shared.predict_proba(rows), model.predict_proba(rows))


def test_stage_2_refuses_a_stage_1_whose_text_it_reads_itself(words, data, tmp_path, capsys):
    line = ["--data_path", data, "--ode_checkpoint", words / TRAJECTORY_FILE, "--epochs", 1]
    line += ["--model_name", TINY_MODEL, "--output_dir", tmp_path, "--log_file", "none"]
    assert refused(capsys, [*map(str, line)], TRAJECTORY_FILE, "--text_features")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [("", "clinical_context"), ([f"x{k}" for k in range(600)], "--text_features words")],
)
def test_texts_that_teach_nothing_are_refused(texts, expected, tmp_path, capsys):
    table().assign(clinical_context=texts).to_csv(tmp_path / "data.csv", index=False)
    words = ["--trajectory_only", "--data_path", tmp_path / "data.csv", "--output_dir", tmp_path]
    words += ["--text_features", "words", "--log_file", "none"]
    assert refused(capsys, [*map(str, words)], expected)
    assert not (tmp_path / "trajectory").exists()


def test_frozen_needs_an_encoder(data, tmp_path, capsys):
    words = ["--trajectory_only", "--data_path", data, "--output_dir", tmp_path]
    assert refused(capsys, [*map(str, words), "--text_features", "frozen"], "--text_model")


# ------------------------------------------------------------------ folds, explanations


def test_the_model_of_all_patients_has_the_text_of_all(data, tmp_path):
    words = ["--text_features", "words", "--folds", 2, "--final", "--trajectory_epochs", 1]
    assert train(tmp_path, data, *words) == 0
    joint = json.loads((tmp_path / "folds_trajectory" / "metrics.json").read_text())
    folds = [metrics(tmp_path / "folds_trajectory" / f"fold_{k}") for k in range(2)]
    weight = np.median([fold["residual_weight"] for fold in folds])
    assert joint["decided"]["residual_weight"] == weight > 0
    assert WITH_TEXT in joint["folds"]["models"]
    model = TrajectoryModel.from_pretrained(tmp_path / "trajectory")
    assert model.trained.text.reading.vocabulary
    found = model.predictions(table(20, seed=6))
    assert f"probability_{WITH_TEXT.replace(' ', '_')}" in found


def test_folds_read_the_texts_once(data, tmp_path):
    words = ["--text_features", "frozen", "--text_model", TINY_MODEL, "--folds", 2]
    assert train(tmp_path, data, *words, "--trajectory_epochs", 1) == 0
    assert [*tmp_path.rglob(CACHE)] == [tmp_path / CACHE]


def test_words_and_windows_that_moved_a_risk_are_named_to_the_owner(run, tmp_path):
    rows = pd.read_csv(data_of(run), nrows=4)
    rows["clinical_context"] = ["vomiting. confused. no eating well", "", "no vomiting", "vomiting"]
    rows.to_csv(tmp_path / "rows.csv", index=False)
    description = data_of(run).with_suffix(".json")
    if description.exists():
        (tmp_path / "rows.json").write_text(description.read_text())
    predicted(run / "trajectory", tmp_path / "rows.csv", tmp_path / "out.csv", "--explain")
    page = (tmp_path / "out.patients.html").read_text()
    assert "Log-odds without it" in page
    named = "from token 0" if run.name == "frozen" else "no eating +"
    assert named in page
