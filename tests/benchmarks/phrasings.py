"""Compare models on contexts whose phrasings no training row has.

    python tests/benchmarks/phrasings.py --out DIR [--seed 0] [--seeds 2] [--rows N]
        [flags of the language model's runs]

Age, sex, unit type and weight of the sample file are rewritten in one of twenty phrasings per row:
twelve serve the training and validation rows, eight others the test rows. Compared on the test rows
are stage 1, the language model on the context alone and on top of stage 1, and regressions on the
words of the same contexts; a regression on the true values, which no context shows, is the ceiling.
A finished run in DIR is not made again.
"""

import argparse
import contextlib
import re
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from common import SAMPLE, machine, write
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import medgemma_trainer as trainer
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.commands.prediction_files import read_predictions
from medgemma_clinical.evaluation.baselines import (
    FOLDS,
    LOGISTIC,
    PENALTIES,
    regression,
    tuning_folds,
)
from medgemma_clinical.evaluation.metrics_table import evaluate_splits
from medgemma_clinical.evaluation.tables import model_table
from medgemma_clinical.evaluation.target import LABEL
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE

STAGE1, TEXT, BOTH = "stage 1", "language model on the context", "language model on stage 1"
WORDS, WORDS_SERIES = "regression on words", "regression on words and series"
TRUE, TRUE_SERIES = "regression on true values", "regression on true values and series"

CONTEXT = re.compile(r"(\d+)-year-old (man|woman), ([\w ]+?)(?:, (\d+) kg)?")

UNITS = {
    "medical ICU": ("MICU", "medical intensive care", "internists' ward"),
    "surgical ICU": ("SICU", "surgical intensive care", "surgeons' ward"),
    "cardiac surgery recovery unit": (
        "CSRU",
        "recovery after cardiac surgery",
        "heart surgeons' ward",
    ),
    "coronary care unit": ("CCU", "coronary care", "cardiologists' ward"),
}
"""Unit of the file: its abbreviation, another name, and a name that test phrasings alone have."""

POUNDS, POUNDS_PER_STONE = 2.20462, 14

# fmt: off
SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
TENS = ("", "teen", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
DECADES = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
)

TRAINING = (
    ("{age}-year-old {man} in the {unit}{weight}", ", {kg} kg"),
    ("{He} is aged {age_words} and lies in the {unit}.{weight}", " {He} weighs {pounds} pounds."),
    ("{SHORT}, {age} y/o {M}{weight}", ", wt {kg}kg"),
    ("In {his} {decade}, {he} was brought to the {unit}{weight}.", "; {his} weight is {stone}"),
    ("Born {age} years ago. Ward: {plain}. Sex: {male}.{weight}", " Body weight: {pounds} lb."),
    ("Not the {other_unit} but the {unit}; no {woman} but a {man}; {age} years{weight}",
     "; {kg} kilograms"),
    ("Admitted to the {unit}{weight}: a {gentleman} of {age_words}.", " at {kg_words} kilograms"),
    ("{male} / {SHORT} / not {OTHER} / {age} yrs{weight}", " / {pounds} lbs"),
    ("{He} turned {age} at {his} last birthday. {He} was not taken to the {other_unit}. "
     "The {unit} admitted {him}{weight}.", " with a weight of {kg} kg"),
    ("{weight}{man} in the {decade}, {plain}", "{stone}; "),
    ("Under {plain}: {he} is {age_words} years old{weight}.", " and has {kg} kilos"),
    ("The age is {age}; this is not a {woman}; not under {other_plain}, under {plain}{weight}.",
     "; the scales said {pounds} pounds"),
)
"""Phrasings of training and validation rows: the text, and its clause of a known weight."""

TESTING = (
    ("{gentleman} aged {age}{weight}; cared for on the {lay}", " ({kg} kilos)"),
    ("{He} is in the {nth} decade of {his} life and on the {lay}{weight}.", ", weighing {stone}"),
    ("{SHORT} adm.: {M}{age}{weight}", ", {kg} kg"),
    ("No {woman}: this {man} is {age_words}, and in the {unit}, not in the {other_unit}.{weight}",
     " {His} weight: {pounds} lb."),
    ("{weight}{age_words} years of life lie behind {him}; {he} is treated in {plain}",
     "With {pounds} pounds on the scales, "),
    ("{male}, {months} months old, {unit}{weight}", ", {grams} g"),
    ("Transferred not to the {other_lay} but to the {lay}: {he} is {age_words}{weight}.",
     " and weighs {kg_words} kilograms"),
    ("{His} age: {decade}. {His} unit: {plain}.{weight}", " {His} weight in kg: {kg}."),
)
"""Phrasings of test rows alone."""
# fmt: on


class Patient(NamedTuple):
    """What a context of the file says: age in years, sex, unit, weight in kg or None."""

    age: int
    man: bool
    unit: str
    kg: int | None


def parse(context):
    """Return the patient of a context of the file; None if the sex is unknown."""
    found = CONTEXT.fullmatch(context)
    if found is None:
        return None
    age, sex, unit, kg = found.groups()
    return Patient(int(age), sex == "man", unit, int(kg) if kg else None)


def in_words(number):
    """Return a number below 1,000 in words."""
    if number >= 100:
        rest = f" and {in_words(number % 100)}" if number % 100 else ""
        return f"{SMALL[number // 100]} hundred{rest}"
    if number < len(SMALL):
        return SMALL[number]
    return TENS[number // 10] + (f"-{SMALL[number % 10]}" if number % 10 else "")


def in_decade(age):
    """Return the third of a decade: late seventies."""
    third = ("early", "mid", "late")[(age % 10 > 3) + (age % 10 > 6)]
    return f"{third} {TENS[age // 10].removesuffix('y')}{'ies' if age >= 20 else 's'}"


def in_stone(kg):
    """Return a weight in stone and pounds: 11 stone 13."""
    stone, pounds = divmod(round(kg * POUNDS), POUNDS_PER_STONE)
    return f"{stone} stone {pounds}"


def phrase(phrasing, patient, other):
    """Return a patient in a phrasing, which may deny another unit by its name."""
    age, kg = patient.age, patient.kg
    short, plain, lay = UNITS[patient.unit]
    other_short, other_plain, other_lay = UNITS[other]
    he, his, him = ("he", "his", "him") if patient.man else ("she", "her", "her")
    man, woman = ("man", "woman") if patient.man else ("woman", "man")
    pieces = {
        **{"age": age, "age_words": in_words(age), "decade": in_decade(age)},
        **{"months": 12 * age, "nth": DECADES[age // 10]},
        **{"he": he, "his": his, "him": him, "He": he.title(), "His": his.title()},
        **{"man": man, "woman": woman, "M": "M" if patient.man else "F"},
        "male": "male" if patient.man else "female",
        "gentleman": "gentleman" if patient.man else "lady",
        **{"unit": patient.unit, "SHORT": short, "plain": plain, "lay": lay},
        **{"other_unit": other, "OTHER": other_short},
        **{"other_plain": other_plain, "other_lay": other_lay},
    }
    text, clause = phrasing
    if kg is None:
        return text.format(**pieces, weight="")
    pieces |= {"kg": kg, "kg_words": in_words(kg), "pounds": round(kg * POUNDS)}
    pieces |= {"stone": in_stone(kg), "grams": 1000 * kg}
    return text.format(**pieces, weight=clause.format(**pieces))


def draw_parts(labels, groups, seed):
    """Draw 40 % train, 20 % validation and 40 % test by patient, stratified by the label."""
    parts = np.empty(len(labels), dtype="U5")
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    names = ("train", "train", "val", "test", "test")
    for name, (_, rows) in zip(names, folds.split(labels, labels, groups), strict=True):
        parts[rows] = name
    return parts


def rewrite(patients, parts, seed):
    """Write each patient in a phrasing of the row's part, drawn by the seed and the row's index."""
    rng = np.random.default_rng(seed)
    texts = []
    for patient, part in zip(patients, parts, strict=True):
        phrasings = TESTING if part == "test" else TRAINING
        others = [unit for unit in UNITS if unit != patient.unit]
        first, second = rng.random(2)
        other = others[int(second * len(others))]
        texts.append(phrase(phrasings[int(first * len(phrasings))], patient, other))
    return texts


def read_table(rows=None):
    """Read the rows of known sex of the sample file as text, or the first so many of them."""
    table = pd.read_csv(SAMPLE, dtype=str)
    table = table.loc[:, ~table.columns.str.startswith("static_")]  # the contexts alone say them
    return table[[parse(text) is not None for text in table["clinical_context"]]][:rows]


def build(table, out, seed):
    """Write a seed's file and description from such a table; return the file's path."""
    parts = draw_parts(table["label_escalation"].to_numpy(), table["subject_id"].to_numpy(), seed)
    texts = rewrite(map(parse, table["clinical_context"]), parts, seed)
    path = out / f"split_{seed}.csv"
    table.assign(clinical_context=texts, split=parts).to_csv(path, index=False)
    shutil.copy(SAMPLE.with_suffix(".json"), path.with_suffix(".json"))
    return path


def words_regression(columns, folds):
    """Return a regression on the words of the column ``text`` and on columns of numbers."""
    impute = SimpleImputer(add_indicator=True, keep_empty_features=True)
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\w+")
    numbers = make_pipeline(impute, StandardScaler())
    inputs = ColumnTransformer([("words", words, "text"), ("numbers", numbers, columns)])
    model = make_pipeline(inputs, LogisticRegression(max_iter=2000))
    penalties = {"logisticregression__C": [0.03, 0.1, 0.3, 1, 3, 10, 30]}
    return search(model, penalties, folds)


def search(model, penalties, folds):
    """Return a regression that chooses its penalty by log loss in the folds."""
    return GridSearchCV(model, penalties, scoring="neg_log_loss", cv=folds or FOLDS)


def rivals(path, table):
    """Fit the regressions on a file's training rows; return the risks of its test rows."""
    dataset, written = MIMICtrajectoryDataset(path), pd.read_csv(path, dtype=str)
    split, labels = dataset.split(0), dataset.labels
    train, test = split["train"], split["test"]
    folds = tuning_folds(labels[train], dataset.groups[train])
    patients = pd.DataFrame(map(parse, table["clinical_context"]))
    true = pd.get_dummies(patients, columns=["unit"]).astype(float)
    series = dataset.baseline_inputs()[LOGISTIC].reset_index(drop=True)
    texts = pd.DataFrame({"text": written["clinical_context"]})
    inputs = {
        WORDS: (texts, words_regression([], folds)),
        WORDS_SERIES: (texts.join(series), words_regression(list(map(str, series)), folds)),
        TRUE: (true, search(regression(), PENALTIES, folds)),
        TRUE_SERIES: (true.join(series), search(regression(), PENALTIES, folds)),
    }
    risks = {"id": dataset.ids[test]}
    for name, (values, model) in inputs.items():
        model.fit(values.iloc[train], labels[train])
        risks[name] = model.predict_proba(values.iloc[test])[:, 1]
    return pd.DataFrame(risks)


def train(out, seed, flags):
    """Train and test the program's models on a seed's file; return their folders."""
    stage1 = out / "stage_1" / "seed_{seed}" / TRAJECTORY_FILE
    language = ["--mode", "classification", "--series_text", "none", *flags]
    models = {
        STAGE1: ("stage_1", "trajectory", ["--trajectory_only"]),
        TEXT: ("context", "classification", [*language, "--soft_prompt", "off"]),
        BOTH: ("both", "classification", [*language, "--ode_checkpoint", str(stage1)]),
    }
    folders = {}
    for model, (name, stage, own) in models.items():
        data = ["--data_path", str(out / "split_{seed}.csv"), "--seed", str(seed), "--seeds", "1"]
        with contextlib.redirect_stdout(sys.stderr):
            code = trainer.main([*own, *data, "--output_dir", str(out / name)])
        if code:
            raise SystemExit(code)
        folders[model] = out / name / f"seed_{seed}" / stage
    return folders


def one_seed(table, out, seed, flags):
    """Return the test risks of every model for one seed."""
    path = build(table, out, seed)
    folders = train(out, seed, flags)
    risks = read_predictions(folders[STAGE1], STAGE1, [LABEL])
    risks = risks[["id", "label", "patient", STAGE1, LOGISTIC]]
    for model in (TEXT, BOTH):
        own = read_predictions(folders[model], model, [LABEL])
        risks = risks.merge(own[["id", model]], on="id", validate="1:1")
    return risks.merge(rivals(path, table), on="id", validate="1:1")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments, flags = parser.parse_known_args(argv)
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began, table = time.perf_counter(), read_table(arguments.rows)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    tables = [one_seed(table, arguments.out, seed, flags) for seed in seeds]
    on = machine("torch", "scikit-learn", threads=arguments.threads)
    write(f"{len(table)} rows; {' '.join(flags)}; {on}")
    for reference in (WORDS, WORDS_SERIES):
        metrics = model_table(evaluate_splits(tables, 0, reference))
        write(f"{metrics.to_string(index=False)}\n")
    write(f"{time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
