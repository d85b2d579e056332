"""Compare models on notes of known truth, in phrasings that no training row has.

    python tests/benchmarks/phrasings.py --out DIR [--sizes 50 250 1000] [--seeds 2]
        [--text_model ENCODER ...] [--model_name FOLDER [flags of the language model's runs]]

Patients are made up. Their risk is known: a part comes from two series, the rest from ten findings
that no column holds. Notes in English or German affirm a finding, deny it, or mention it of a
relative or in a plan, which has no effect. ``from_long`` reads them; notes that were written or
stored after the prediction time tell the outcome, and must not be read. Names of findings and forms
of sentences of the test rows occur in no other row, or with ``--unseen 0``, a control, in all.

Each size is a number of labelled patients, a fifth of whom validate; smaller ones are parts of
larger ones, and each seed draws new patients, as does another largest size. A run that is finished
in DIR is not made again.
"""

import argparse
import itertools
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from common import machine, train, write
from matplotlib.figure import Figure
from scipy.special import expit
from sklearn.model_selection import GridSearchCV

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.commands.prediction_files import read_predictions, shared_models
from medgemma_clinical.evaluation.baselines import (
    BLEND,
    ENSEMBLE,
    FOLDS,
    FROZEN,
    LOGISTIC,
    PENALTIES,
    WITH_TEXT,
    WORDS,
    regression,
)
from medgemma_clinical.evaluation.metrics_table import VALUE, evaluate_splits
from medgemma_clinical.evaluation.tables import METRICS
from medgemma_clinical.evaluation.target import LABEL
from medgemma_clinical.evaluation.verdicts import difference_text
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.text_encoder import CACHE

STAGE1, WITH_WORDS = "stage 1", "stage 1 + words"
TUNED, TUNED_ON, SOFT = "LoRA on the text", "LoRA on the text + stage 1", "soft prompt + stage 1"
KNOWN, TRUE = "regression on true findings and series", "true risk"
SHOWN = ("auroc", "log_loss")

PREDICTED, HOUR = 24.0, pd.Timedelta("1h")
"""Hour of the prediction time."""

INTERCEPT = -2.35
"""Log-odds that make an event rate of a quarter."""


class Series(NamedTuple):
    """A straight line with noise, and its effects on the log-odds."""

    unit: str
    start: tuple[float, float]  # mean and standard deviation over patients
    slope: tuple[float, float]  # an hour
    noise: float
    lowest: float
    usual: float  # last value without effect
    per_unit: float  # effect of the last value
    per_slope: float  # effect of the least-squares slope


SERIES = {
    "anion gap": Series("mEq/L", (26, 4), (-0.35, 0.2), 1.0, 4, 19, 0.12, 2.0),
    "glucose": Series("mg/dL", (420, 80), (-10, 4), 15.0, 40, 220, 0.004, 0.05),
}


class Finding(NamedTuple):
    """What notes alone say of a patient."""

    beta: float  # effect on the log-odds
    share: float  # of patients who have it
    aside: str  # how it may be mentioned of one who lacks it
    en: tuple[str, ...]  # its name in training rows, then those in test rows alone
    de: tuple[str, ...]  # denied, so that the gender is known


# fmt: off
FINDINGS = {
    "vomiting": Finding(
        1.2, 0.3, "plan", ("vomiting", "throwing up", "bringing up food"),
        ("kein Erbrechen", "kein Übergeben", "kein Hochwürgen von Nahrung")),
    "chest pain": Finding(
        1.1, 0.2, "plan", ("chest pain", "angina", "retrosternal pressure"),
        ("kein Brustschmerz", "keine Angina", "kein Druck am Sternum")),
    "sepsis": Finding(
        1.8, 0.15, "plan", ("sepsis", "blood poisoning", "bacteraemia"),
        ("keine Sepsis", "keine Blutvergiftung", "keine Bakteriämie")),
    "earlier ketoacidosis": Finding(
        1.0, 0.3, "family",
        ("earlier ketoacidosis", "diabetic crisis in the past", "ketotic coma years ago"),
        ("keine Ketoazidose früher", "keine diabetische Entgleisung vor Jahren",
         "kein Koma durch Ketone in der Jugend")),
    "missed insulin": Finding(
        -1.1, 0.35, "plan", ("missed insulin", "skipped injections", "failure of the pump"),
        ("keine vergessene Insulingabe", "keine versäumte Spritze", "kein Ausfall der Pumpe")),
    "renal failure": Finding(
        1.5, 0.15, "family", ("renal failure", "kidney disease", "uraemia"),
        ("kein Nierenversagen", "keine Urämie", "kein Funktionsverlust beider Nieren")),
    "confusion": Finding(
        1.6, 0.15, "plan", ("confusion", "delirium", "clouded consciousness"),
        ("keine Verwirrtheit", "kein Delir", "keine Eintrübung")),
    "returning appetite": Finding(
        -1.3, 0.35, "plan", ("returning appetite", "hunger", "desire for breakfast"),
        ("keine Zunahme des Appetits", "kein Hunger", "keine Lust auf Frühstück")),
    "heart failure": Finding(
        1.2, 0.15, "family", ("heart failure", "weak left ventricle", "cardiomyopathy"),
        ("keine Herzschwäche", "keine Pumpschwäche links", "keine Kardiomyopathie")),
    "walking": Finding(
        -1.1, 0.4, "plan", ("unaided walking", "strolls along the corridor", "steps on their own"),
        ("kein Gehen ohne Hilfe", "kein Spaziergang im Flur", "kein Aufstehen aus eigener Kraft")),
}
FORMS = {
    "en": {
        "present": (
            ("Positive for {x}.", "{X}: yes.", "There is {x}."),
            ("{X} confirmed.", "Presents with {x}.", "We found {x}.", "{X} (+).")),
        "absent": (
            ("Denies {x}.", "No sign of {x}.", "{X}: no."),
            ("{X} ruled out.", "Free of {x}.", "{X} is not present.", "Nobody has seen {x}.")),
        "family": (
            ("Mother has {x}.", "Family history of {x}."),
            ("A brother suffers from {x}.", "Among relatives: {x} (grandfather).")),
        "plan": (
            ("If {x}, call the doctor.", "Watch for {x}."),
            ("Should {x} develop, consider transfer.", "Tomorrow ask again about {x}.")),
        "filler": (
            ("Slept well.", "Lives with a partner.", "Fluids as ordered.", "Line in place."),
            ("Reads the newspaper.", "Dressing changed.", "Visited by a friend.")),
    },
    "de": {
        "present": (
            ("{X}: ja.", "Es besteht {x}.", "{X} liegt vor."),
            ("{X} bestätigt.", "Zeigt {x}.", "Diagnose heute: {x}.", "{X} (+).")),
        "absent": (
            ("{No}.", "{X} verneint.", "Kein Hinweis auf {x}."),
            ("{X} ausgeschlossen.", "{X} liegt nicht vor.", "Nie {x}.", "Niemand sah {x}.")),
        "family": (
            ("Mutter: {x}.", "{X} in der Familie."),
            ("Ein Bruder hatte {x}.", "Verwandte: {x} (Großvater).")),
        "plan": (
            ("Falls {x}, Arzt rufen.", "Auf {x} achten."),
            ("Sollte {x} auftreten, Verlegung erwägen.", "Morgen erneut nach {x} fragen.")),
        "filler": (
            ("Gut geschlafen.", "Lebt mit Partner.", "Infusion nach Plan.", "Zugang liegt."),
            ("Liest Zeitung.", "Verband gewechselt.", "Besuch von einer Freundin.")),
    },
}
"""Forms of sentences by language and kind: of training and validation rows, of test rows alone."""

OUTCOMES = {
    "en": ("Resolved, went home.", "Escalated, now in intensive care."),
    "de": ("Abgeklungen, nach Hause entlassen.", "Eskaliert, jetzt auf der Intensivstation."),
}
# fmt: on


def pick(rng, options):
    """Draw one of some options."""
    return options[rng.integers(len(options))]


def say(form, name):
    """Write a finding in a form of a sentence."""
    bare = re.sub("^keine? ", "", name)
    first, denied = bare[0].upper() + bare[1:], name[0].upper() + name[1:]
    return form.format(x=bare, X=first, No=denied)


def describe(rng, has, language, share):
    """Write a patient's findings, a share of them in phrasings of test rows alone."""
    sentences = []
    for finding, there in zip(FINDINGS.values(), has, strict=True):
        kind = "present" if there else pick(rng, ("absent", "absent", finding.aside, "", ""))
        if kind:
            unseen = int(rng.random() < share)
            names = finding.en if language == "en" else finding.de
            name = pick(rng, names[1:]) if unseen else names[0]
            sentences.append(say(pick(rng, FORMS[language][kind][unseen]), name))
    sentences += rng.permutation(FORMS[language]["filler"][int(share > 0)])[:3].tolist()
    return rng.permutation(sentences).tolist()


def write_notes(rng, has, label, share):
    """Return a patient's notes: hours of writing and storing, text; the last two come too late."""
    language = pick(rng, ("en", "de"))
    sentences = describe(rng, has, language, share)
    written = np.sort(rng.uniform(-30, PREDICTED - 1, rng.integers(2, 5)))
    parts = np.array_split(sentences, len(written))
    notes = [(at, at + 0.5, " ".join(part)) for at, part in zip(written, parts, strict=True)]
    for at in (PREDICTED - 0.5, PREDICTED + 0.5):  # stored late; written late
        late = [*describe(rng, ~has, language, share), OUTCOMES[language][label]]
        notes.append((at, PREDICTED + 1, " ".join(late)))
    return notes


def draw_series(rng):
    """Draw a patient's values, and what they add to the log-odds."""
    values, effect = [], 0.0
    for item, series in SERIES.items():
        hours = np.sort(rng.uniform(0, PREDICTED, rng.integers(3, 8))).round(2)
        line = rng.normal(*series.start) + rng.normal(*series.slope) * hours
        noisy = line + rng.normal(0, series.noise, len(hours))
        seen = np.maximum(noisy, series.lowest).round(1)
        effect += series.per_unit * (seen[-1] - series.usual)
        effect += series.per_slope * (np.polyfit(hours, seen, 1)[0] - series.slope[0])
        values += [
            (hour, item, value, series.unit) for hour, value in zip(hours, seen, strict=True)
        ]
    return values, effect


def draw_patients(seed, labelled, tested, unseen=1.0):
    """Draw values, patients and notes as three long tables, and the truth of each patient.

    The labelled patients come first, so ordered that any beginning has the event rate of all.
    """
    rng, count = np.random.default_rng(seed), labelled + tested
    has = rng.random((count, len(FINDINGS))) < [finding.share for finding in FINDINGS.values()]
    series, effects = zip(*(draw_series(rng) for _ in range(count)), strict=True)
    odds = INTERCEPT + np.array(effects) + has @ [finding.beta for finding in FINDINGS.values()]
    labels = (rng.random(count) < expit(odds)).astype(int)
    alike = pd.Series(labels[:labelled]).groupby(labels[:labelled])
    nth = alike.cumcount()  # of those with the same label
    order = [*np.argsort((nth + 0.5) / alike.transform("size"), kind="stable")]
    parts = [*np.where(nth % 5 == 2, "val", "train"), *["test"] * tested]
    values, patients, notes, truth = [], [], [], []
    for number, k in enumerate([*order, *range(labelled, count)]):
        name, admitted = f"p{seed}_{number}", pd.Timestamp("2026-01-01 08:00") + k * HOUR
        share = unseen * (parts[k] == "test")
        patients.append((name, admitted + PREDICTED * HOUR, labels[k], parts[k]))
        values += [(name, admitted + hour * HOUR, *value) for hour, *value in series[k]]
        for written, stored, text in write_notes(rng, has[k], labels[k], share):
            notes.append((name, admitted + written * HOUR, admitted + stored * HOUR, text))
        truth.append((name, expit(odds[k]), *has[k].astype(int)))
    return (
        pd.DataFrame(values, columns=["subject_id", "time", "item", "value", "unit"]),
        pd.DataFrame(patients, columns=["subject_id", "prediction_time", "label", "split"]),
        pd.DataFrame(notes, columns=["subject_id", "time", "storetime", "text"]),
        pd.DataFrame(truth, columns=["patient", TRUE, *FINDINGS]),
    )


def build(folder, seed, sizes, tested, unseen):
    """Write the data file of each size by way of ``from_long``; return the truth."""
    folder.mkdir(parents=True, exist_ok=True)
    values, patients, notes, truth = draw_patients(seed, max(sizes), tested, unseen)
    values.to_csv(folder / "values.csv", index=False)
    notes.to_csv(folder / "notes.csv", index=False)
    words = ["--table", folder / "values.csv", "--notes", folder / "notes.csv"]
    words += ["--label", "Escalation=label", "--keep", "split"]
    words += ["--equal_times", "keep", "--max_note_words", 500]
    for name, series in SERIES.items():
        words += ["--series", f"{name} [{series.unit}]={name}"]
    for size in sizes:
        listed = patients[(patients.index < size) | (patients["split"] == "test")]
        labels, path = folder / f"patients_{size}.csv", folder / f"{size}.csv"
        listed.to_csv(labels, index=False)
        train("from_long", *words, "--labels", labels, "--out", path)  # a verb of the trainer, too
        check_contexts(path, listed, notes)
    return truth


def check_contexts(path, patients, notes):
    """Check that contexts hold each note that was stored by the prediction time, and no other."""
    rows, until = (table.set_index("subject_id") for table in (pd.read_csv(path), patients))
    notes = notes[notes["subject_id"].isin(until.index)]
    contexts = rows["clinical_context"][notes["subject_id"]]
    held = [text in context for text, context in zip(notes["text"], contexts, strict=True)]
    in_time = notes["storetime"] <= until["prediction_time"][notes["subject_id"]].to_numpy()
    assert held == in_time.tolist()


def list_models(arguments, flags, out):
    """Return the trainer's flags of each model, whose outputs lie below ``out``."""
    alone = ["--trajectory_only"]
    models = {STAGE1: alone, WITH_WORDS: [*alone, "--text_features", "words"]}
    for folder in arguments.text_model:
        frozen = ["--text_features", "frozen", "--text_model", folder]
        models[f"{STAGE1} + {Path(folder).name}"] = [*alone, *frozen]
    if arguments.model_name:
        tuned = ["--mode", "classification", "--series_text", "none", *flags]
        tuned += ["--model_name", arguments.model_name]
        on_stage1 = ["--ode_checkpoint", out / "stage_1" / "seed_{seed}" / TRAJECTORY_FILE]
        models[TUNED] = [*tuned, "--soft_prompt", "off"]
        models[TUNED_ON] = [*tuned, "--soft_prompt", "off", *on_stage1]
        models[SOFT] = [*tuned, *on_stage1]
    return models


def run_models(path, out, seed, models, sizes):
    """Train what is not trained yet; return the test risks of all models and their baselines."""
    risks = None
    for model, flags in models.items():
        began, folder = time.perf_counter(), out / re.sub(r"\W+", "_", model)
        states = folder / f"seed_{seed}" / CACHE
        largest = out.parent / str(max(sizes)) / states.relative_to(out)
        if largest.is_file() and not states.is_file():  # of the same texts
            states.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(largest, states)
        train(*flags, "--data_path", path, "--seed", seed, "--seeds", 1, "--output_dir", folder)
        stage = "trajectory" if "--trajectory_only" in flags else "classification"
        run = folder / f"seed_{seed}" / stage
        weight = json.loads((run / "metrics.json").read_text()).get("residual_weight")
        seconds = f"{time.perf_counter() - began:.0f} s"
        write(f"{path.stem} patients, seed {seed}, {model}: {seconds}, weight {weight}")
        table = read_predictions(run, model, [LABEL])
        # Not as ``ensemble``, which is always compared with the blend.
        table = table.rename(columns={ENSEMBLE: f"{ENSEMBLE}, {model}"})
        if model == STAGE1:
            others = (LOGISTIC, BLEND, WORDS, f"{ENSEMBLE}, {model}")
            found = [name for name in others if name in table]
            risks = table[["id", "label", "patient", model, *found]]
            continue
        reading = model.removeprefix(f"{STAGE1} + ")
        names = {name: f"{name}, {reading}" for name in (FROZEN, WITH_TEXT) if name in table}
        own = [name for name in (model, f"{ENSEMBLE}, {model}") if name in table]
        added = table[["id", *own, *names]].rename(columns=names)
        risks = risks.merge(added, on="id", validate="1:1")
    return risks


def known_findings(path, truth):
    """Return the test risks of a regression on the true findings and the series."""
    dataset = MIMICtrajectoryDataset(path)
    split = dataset.split(0)
    labelled = np.concatenate([split["train"], split["val"]])  # baselines learn from both, too
    series = dataset.baseline_inputs()[LOGISTIC].to_numpy()
    inputs = np.column_stack([series, truth.set_index("patient").loc[dataset.groups, [*FINDINGS]]])
    model = GridSearchCV(regression(), PENALTIES, scoring="neg_log_loss", cv=FOLDS)
    model.fit(inputs[labelled], dataset.labels[labelled])
    risks = model.predict_proba(inputs[split["test"]])[:, 1]
    return pd.DataFrame({"patient": dataset.groups[split["test"]], KNOWN: risks})


def results_table(tables, size, references):
    """Return the metrics of one size with their paired differences as lines of Markdown."""
    # No model has learned from patients of another seed, so no interval is widened.
    found = [evaluate_splits(tables, 0, name, trained=math.inf) for name in references]
    heads = [METRICS[name].title for name in SHOWN]
    heads += [f"{METRICS[x].title}, minus {name}" for name in references for x in SHOWN]
    lines = [["Labelled", "Model", *heads], ["---"] * (2 + len(heads))]
    for model in found[0].models:
        texts = [METRICS[name].text(found[0].row(model, name)) for name in SHOWN]
        for metrics, name in itertools.product(found, SHOWN):
            is_reference = model == metrics.models[0]
            form = f"+{METRICS[name].form}"
            texts.append("" if is_reference else difference_text(metrics.row(model, name), form))
        lines.append([str(size), model, *texts])
    return found[0], "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_curves(by_size, path):
    """Draw AUROC and log loss of each model over the number of labelled patients."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(1, len(SHOWN))
    models = list(dict.fromkeys(model for metrics in by_size.values() for model in metrics.models))
    for axis, name in zip(axes, SHOWN, strict=True):
        for k, model in enumerate(models):
            sizes = [size for size, metrics in by_size.items() if model in metrics.models]
            lines = pd.DataFrame([by_size[size].row(model, name)[VALUE] for size in sizes])
            value = lines["value"].to_numpy(float)
            ends = abs(lines[["low", "high"]].to_numpy(float).T - value)
            beside = np.array(sizes) * 1.01 ** (k - len(models) / 2)  # no two bars on one line
            style = {"color": f"C{k % 10}", "linestyle": ("-", "--", ":")[k // 10], "label": model}
            axis.errorbar(beside, value, ends, marker="o", markersize=3, capsize=2, **style)
        axis.set(xscale="log", xlabel="labelled patients", ylabel=METRICS[name].title)
        axis.set_xticks([*by_size], [*map(str, by_size)])
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 250, 500, 1000])
    parser.add_argument("--rows", type=int, default=1500, help="test patients of each seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--unseen", type=float, default=1.0, help="share of test phrasings")
    parser.add_argument("--text_model", action="append", default=[], help="a frozen encoder")
    parser.add_argument("--model_name", help="language model of stage 2")
    arguments, flags = parser.parse_known_args(argv)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    sizes = sorted(arguments.sizes)
    write(machine("torch", "scikit-learn"))
    tables = {size: [] for size in sizes}
    for seed in seeds:
        folder = arguments.out / f"data_{seed}"
        truth = build(folder, seed, sizes, arguments.rows, arguments.unseen)
        for size in reversed(sizes):
            path = folder / f"{size}.csv"
            out = arguments.out / str(size)
            risks = run_models(path, out, seed, list_models(arguments, flags, out), sizes)
            for table in (known_findings(path, truth), truth[["patient", TRUE]]):
                risks = risks.merge(table, on="patient", validate="1:1")
            tables[size].append(risks)
    by_size = {}
    for size, of_seeds in tables.items():
        shared = shared_models(of_seeds, LABEL)
        references = [name for name in (STAGE1, WITH_WORDS, BLEND) if name in shared[0]]
        by_size[size], text = results_table(shared, size, references)
        write(f"{by_size[size].counts}\n{text}\n")
    draw_curves(by_size, arguments.out / "learning_curve.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
