"""The model card: what a reader on the hub must know of a trained model, from its checkpoint alone.

Words that come from data or from a checkpoint stand as Markdown code, in which nothing is markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.models.language_model import TINY
from medgemma_clinical.models.sharing.terms import licence, terms_of

SCORED_PARTS = ("validation", "test")
"""Parts of the split whose figures a checkpoint holds, under their names in ``metrics.json``."""

RANKING_FIGURES = ("auroc", "auprc", "brier")
CALIBRATION_FIGURES = ("calibration_slope", "calibration_intercept")
"""Figures of a model that a checkpoint holds; of a baseline those of the first line alone."""

INTENDED_USE = "Research on the question above, on data like those of the training part."
LIMITS = (
    "The figures come from one data set that was split by patient. They may not hold in another "
    "hospital or another time. Where treatment shapes the label, the model predicts treatment as "
    "well as disease. Figures of a test part of this size move by chance: read the interval, not "
    "the value."
)
PASSING_ON = (
    "A model that was trained on patients may be personal data: see what the agreement of the data "
    "allows before you pass it on."
)

RANDOM_MODEL = (
    "The language model is tiny and random. This page shows the path from data to report; its "
    "figures say nothing about MedGemma."
)
RANDOM_MODEL_UNREAD = (
    "Demonstration run (--model_name tiny): the page shows the path from data to report. Stage 1 "
    "reads no language model: its figures are its own."
)

MOST_NAMES = 50
"""Series or facts that a card names."""

TITLES = {
    "trajectory": "Risk of an outcome from a clinical trajectory",
    "classification": "Risk of an outcome from a clinical trajectory and text",
    "generative": "Short reports on clinical trajectories",
}
TASKS = {"trajectory": "tabular-classification", "classification": "tabular-classification"}
"""The hub's name of the task: a row of a table in, a class out. It has none for stage 3."""

TAGS = ("clinical", "time-series", "irregular-time-series", "risk-prediction")

CARD = """\
---
{header}
---

# {title}

{what}

**Research software. Not a medical device, not for clinical use.**

## Task

- Question: {question}
- Outcome: {outcome}
- Series: {series}
- Facts: {facts}

## Model

{parts}

## Data

{data}

No row and no identifier lies in these files.

## Results

{results}

## Use

```python
from medgemma_trainer import TrajectoryModel

model = TrajectoryModel.from_pretrained({place})
risks = model.predict_proba(rows)  # rows like those of the training data, with the same columns
```

or, with one line in `predictions.csv` for each row (registry data: `--data_dir` and their folder):

```bash
{command}
```

## Intended use and limits

{limits}

## Terms

{terms}
"""


def model_card(config: dict[str, Any], repo_id: str | None = None) -> str:
    """Return the model card of a checkpoint, README.md of its folder and of its repository.

    Args:
        config: the checkpoint's, as ``check_config`` accepts it; without ``figures`` the run is
            not finished.
        repo_id: where the card will lie on the hub; None for a folder.
    """
    stage, units = config["stage"], zip(config["features"], config["units"], strict=True)
    return CARD.format(
        header="\n".join(header_lines(config)),
        title=TITLES[stage],
        what=describe_model(config),
        question=code(config["question"]),
        outcome=code(config["outcome"]),
        series=_names([f"{name} ({unit})" if unit else name for name, unit in units]),
        facts=_names(config["inputs"]["facts"]),
        parts=_bullets(_parts(config)),
        data=_bullets(_data(config)),
        results=_results(config),
        place=json.dumps(repo_id or "FOLDER"),
        command=_command(repo_id),
        limits=f"{INTENDED_USE} {LIMITS} {PASSING_ON}",
        terms=licence(config),
    )


# ------------------------------------------------------------------ header


def header_lines(config: dict[str, Any]) -> list[str]:
    """Return the lines of the card's YAML header; texts are quoted as JSON, which YAML reads."""
    tags, keys = list(TAGS), dict(terms_of(config).header)
    if (base := config.get("base_model")) is None:
        keys["library_name"] = "pytorch"
    else:
        keys["library_name"] = "peft"  # of adapter/; the other parts are this program's
        tags += ["lora", "soft-prompt"] if config["num_prefix_tokens"] else ["lora"]
        if "license_name" in keys:
            tags.append("medgemma")
        own_weights = config["base_weights"] == "pretrained"
        if own_weights and config["base_sha256"] is None and base != TINY:
            keys |= {"base_model": base, "base_model_relation": "adapter"}
    if config["stage"] in TASKS:
        keys["pipeline_tag"] = TASKS[config["stage"]]
    return [
        *(f"{key}: {json.dumps(text)}" for key, text in keys.items()),
        f"tags: {json.dumps(tags)}",
    ]


# ------------------------------------------------------------------ the model in words


def describe_model(config: dict[str, Any]) -> str:
    """Return in a paragraph what a model reads, what it is made of and what comes out."""
    if config["stage"] == "trajectory":
        return (
            "An encoder of irregular time series and its head: the measurements of a patient, at "
            "the times at which they were taken, give the probability of an outcome. No language "
            "model is part of it."
        )
    prefix = config["num_prefix_tokens"]
    soft = f"{prefix} soft tokens made from the states of an encoder of the measurements, and "
    out = (
        "gives the probability of an outcome"
        if config["stage"] == "classification"
        else "writes a short report with a verdict, whose probability is given too"
    )
    return (
        f"A LoRA adapter and the modules beside it: a language model reads "
        f"{soft if prefix else ''}a text about a patient, and {out}. The adapter (`adapter/`) "
        "loads with PEFT; without the modules beside it, it gives neither probability nor soft "
        "tokens."
    )


def controls_of(config: dict[str, Any]) -> list[str]:
    """Return in words what makes a model of stage 2 or 3 a control."""
    words = []
    if config["base_weights"] == "random":
        words.append("with random weights in place of its own, a control")
    if config["shuffled"]:
        words.append("with soft tokens of other patients, a control")
    return words


def describe_language_model(config: dict[str, Any]) -> str:
    """Return the base model of stage 2 or 3, and what makes it a control, in words."""
    return ", ".join([str(config["base_model"]), *controls_of(config)])


def random_model_notice(config: dict[str, Any], model_name: str = "") -> str:
    """Return what a page says first of a run with the built-in random model; else nothing.

    Args:
        config: of a checkpoint of any stage.
        model_name: of the run, which stage 1 does not read.
    """
    if config.get("base_model") == TINY and config["base_sha256"] is None:
        return RANDOM_MODEL
    unread = config.get("base_model") is None and model_name == TINY
    return RANDOM_MODEL_UNREAD if unread else ""


def weight_0_sentence(config: dict[str, Any]) -> str:
    """Return what a page says first where the language model has no weight; else nothing.

    The risks may differ from those of stage 1, whose recalibration may be another.
    """
    if config.get("residual_weight") != 0:
        return ""
    return "The language model has weight 0 and adds nothing: rows are ranked as by stage 1 alone."


def describe_weight(config: dict[str, Any]) -> str:
    """Return the weight of the language model of stage 2 or 3 beside stage 1's logit, in words."""
    if not config["stage1_logit"]:
        return "stage 1's logit is not added"
    if config["residual_weight"] == 0:
        return "0: the language model adds nothing here, rows are ranked as by stage 1 alone"
    return f"{config['residual_weight']:g}, chosen on the validation part"


def describe_stage1(config: dict[str, Any]) -> str:
    """Return encoder, dynamics and number of members of a checkpoint's stage 1 in words."""
    dynamics = config["encoder"].get("dynamics")
    how = f", dynamics {dynamics}" if dynamics else ""
    return f"encoder ClinicalODERNN{how}, members {config['members']}"


def _parts(config: dict[str, Any]) -> dict[str, str]:
    """Return what the model is made of, by name."""
    parts = {}
    if config["encoder"] is not None:
        parts["Stage 1"] = code(describe_stage1(config))
    if (base := config.get("base_model")) is not None:
        parts["Base model"] = ", ".join([code(base), *controls_of(config)])
        if files := config["base_sha256"]:
            parts["SHA-256 of the base model's files"] = f"`{files}`"
        elif revision := config["base_revision"]:
            parts["Revision of the base model"] = f"`{revision}`"
        packed = "4-bit NF4" if config["quantization"] == "nf4" else "not quantised"
        parts["Base weights"] = f"{packed}, computed in {config['precision']}"
        parts["Weight of the language model beside stage 1"] = describe_weight(config)
    if "decision" in config:
        threshold = f"{config['decision']['threshold']:.4g}, chosen on the validation part"
        parts["Probability from which on the event is predicted"] = threshold
    return parts


# ------------------------------------------------------------------ data and results


def card_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Pick the figures that a card shows from the content of ``metrics.json``.

    What is hidden there, since few patients stand behind it, is null here too.
    """

    def pick(part: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        return {name: part[name] for name in ("n", "events", *names)}

    known = metrics["calibration"]
    figures = {
        **{p: pick(metrics[p], (*RANKING_FIGURES, *CALIBRATION_FIGURES)) for p in SCORED_PARTS},
        "baselines": {
            name: {part: pick(parts[part], RANKING_FIGURES) for part in SCORED_PARTS}
            for name, parts in metrics["baselines"].items()
        },
        "calibration": {
            name: known[name] for name in ("method", "slope", "intercept") if name in known
        },
    }
    return figures | ({"reports": metrics["reports"]} if "reports" in metrics else {})


def _data(config: dict[str, Any]) -> dict[str, str]:
    """Return kind and size of the data, by name."""
    mix, figures = config["case_mix"], config.get("figures", {})
    training = f"{mix['rows']:,.0f} rows" if "rows" in mix else "number of rows not shown"
    if "patients" in mix:
        training += f" of {mix['patients']:,.0f} patients"
    if "prevalence" in mix:
        training += f", {100 * mix['prevalence']:.1f} % with the event"
    parts = {
        f"{part.capitalize()} part": _counts(figures[part]) for part in SCORED_PARTS if figures
    }
    return {
        "Kind": code(config["dataset"]),
        "Training part": training,
        **parts,
        "SHA-256 of the data": f"`{config['data_sha256']}`",
    }


def _counts(part: dict[str, Any]) -> str:
    events = part["events"]
    shown = "number of events not shown" if events is None else f"{events:,} with the event"
    return f"{part['n']:,} rows, {shown}"


def _results(config: dict[str, Any]) -> str:
    """Return figures beside the baselines, calibration, threshold and reports."""
    figures = config.get("figures")
    if figures is None:
        return "The run is not finished: this checkpoint is its best epoch so far."
    test, validation = figures["test"], figures["validation"]
    rows = {"This model": test}
    rows |= {_cell(name): parts["test"] for name, parts in figures["baselines"].items()}
    table = [
        "| Test part | AUROC | AUPRC | Brier score |",
        "|---|---|---|---|",
        *(
            f"| {name} | {' | '.join(_texts(part, RANKING_FIGURES))} |"
            for name, part in rows.items()
        ),
    ]
    slope, intercept = _texts(test, CALIBRATION_FIGURES)
    lines = {
        "Validation AUROC": _texts(validation, ("auroc",))[0],
        "Calibration on the test part": f"slope {slope}, intercept {intercept}",
        "Recalibration": _recalibration(figures["calibration"]),
    }
    if "reports" in figures:
        lines["Written reports"] = _written(figures["reports"])
    return "\n".join(
        [
            *table,
            "",
            "Values with 95 % intervals (bootstrap over patients). A dash: not defined, or hidden "
            "since few patients stand behind it.",
            "",
            _bullets(lines),
        ]
    )


def _texts(part: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [Estimate(**part[name]).text() for name in names]


def _recalibration(calibration: dict[str, Any]) -> str:
    if "slope" not in calibration:
        return "none" if calibration["method"] == "none" else "by Platt's method"
    slope, intercept = calibration["slope"], calibration["intercept"]
    return f"by Platt's method on the validation part, slope {slope:.3f}, intercept {intercept:.3f}"


def _written(reports: dict[str, Any]) -> str:
    def share(name: str) -> str:
        return f"{Estimate(**reports[name]).text('.1f', 100)} %"

    text = f"{reports['reports']:,} of the test part, {share('parse_share')} of the expected form; "
    if reports["numbers_stated"]:
        text += (
            f"of the {reports['numbers_stated']:,} numbers that they state "
            f"{share('true_number_share')} are the patient's; "
        )
    text += f"{share('inventing_share')} of the reports state something that the row does not hold"
    if reports["abnormal_named_share"]["value"] is not None:
        text += f"; {share('abnormal_named_share')} of the abnormal values are named"
    if reports["right_trend_share"]["value"] is not None:
        text += f"; {share('right_trend_share')} of the trends are right"
    return text


# ------------------------------------------------------------------ use


def _command(repo_id: str | None) -> str:
    """Return the command lines that predict rows; a model on the hub is downloaded first."""
    lines = [] if repo_id is None else [f"hf download {repo_id} --local-dir FOLDER"]
    lines += [
        "python medgemma_trainer.py --predict --checkpoint FOLDER \\",
        "    --data_path new_patients.csv --predictions predictions.csv",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------ Markdown


def code(text: str) -> str:
    """Return a text of one line as Markdown code, whatever characters it has."""
    fence = "`"
    while fence in text:
        fence += "`"
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _cell(text: str) -> str:
    """Return a text as code in a table, where a bar would end the cell even within code."""
    return code(text.replace("|", "\N{BROKEN BAR}"))


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(map(code, names[:MOST_NAMES]))
    more = len(names) - MOST_NAMES
    return f"{shown} and {more:,} more" if more > 0 else shown or "none"


def _bullets(lines: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in lines.items())
