"""Read what ``monitor`` judges, and write its page."""

from __future__ import annotations

import logging
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from medgemma_clinical import files
from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.config import read_toml
from medgemma_clinical.commands.prediction_files import parse, read_table
from medgemma_clinical.commands.predictions import inputs_path
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.evaluation.decision import parse_threshold
from medgemma_clinical.evaluation.metrics_table import MODEL, named_model
from medgemma_clinical.evaluation.monitor_page import monitor_page
from medgemma_clinical.evaluation.monitoring import MonitorRule, monitor
from medgemma_clinical.evaluation.report import write_report
from medgemma_clinical.evaluation.target import Target, targets_of_config
from medgemma_clinical.evaluation.topics.topic import Page
from medgemma_clinical.files import InputError
from medgemma_clinical.models import trained_model
from medgemma_clinical.models.checkpoints import Config
from medgemma_clinical.models.model_card import page_card

logger = logging.getLogger(__name__)

PAGE = "monitor.html"
PREDICTED_AT = "predicted_at"
AHEAD = pd.Timedelta(hours=14)  # of UTC, the first time zone
YEAR = pd.Timedelta(days=366)


def rule_config(path: Path | None) -> Config:
    """Return what a checkpoint stores of ``--monitor_rule``, without a file the default."""
    content = {} if path is None else read_toml(path, f"--monitor_rule {path}")
    try:
        return {"monitor_rule": asdict(MonitorRule.checked(content))}
    except ValueError as error:
        raise InputError(f"--monitor_rule {path}: {error}") from error


def run_monitor(args: Namespace, datasets: Mapping[str, Any]) -> int:
    """Write ``monitor.html`` and ``monitor.csv``; log the verdict first."""
    config = trained_model.read_trained_config(args.checkpoint)
    scored = read_scored(args.predictions, args.checkpoint, args.use, config)
    target, name = targets_of_config(config)[0], scored.name
    outcomes = read_outcomes(args.outcomes, args.date, scored.rows["date"].max(), target)
    if len(outcomes) and not outcomes.index.isin(scored.rows["id"]).any():
        count = f"{args.outcomes}: none of its {len(outcomes):,} ids is that of a prediction"
        raise InputError(f"{count}: name patients there as column id of the predictions does")
    rows, notes = join_outcomes(scored.rows, outcomes, target)
    if args.site is not None:
        ids = scored.rows.loc[rows.index]
        rows["site"] = sites_of(ids, outcomes, args.site, args.outcomes)
    notes = [*scored.notes, *notes]
    reference = config.get("reference", {}).get(name)
    if reference is None:
        raise InputError(
            f"--checkpoint {args.checkpoint}: holds no calibration of {name}: fewer than 11 "
            "held-out patients had, or lacked, the event, or an earlier version wrote it: train "
            "again, with --folds where there are few"
        )
    rule = MonitorRule.checked(config.get("monitor_rule", {}))
    threshold = threshold_of(config, name, args.threshold)
    check_predictions(rows, threshold)
    result = monitor(
        rows,
        scored.inputs,
        threshold=threshold,
        reference=reference,
        training=config["case_mix"].get("last", {"series": {}, "static": {}}),
        rule=rule,
        period=args.period,
        seed=args.seed,
    )
    card = {
        "Rule, fixed at training": rule.words,
        "Limits": result.levels.words,
        "Development cohort": f"{reference['patients']:,} held-out patients: log-odds "
        f"multiplied by {reference['multiplier']:.2f} and shifted by {reference['shift']:+.2f}",
        "Slope and AUROC": f"Of periods with at least {rule.min_expected} expected events",
        "Threshold": f"{threshold:.4g}",
    }
    title = f"{config['outcome']}: {name} after go-live"
    page = monitor_page(result, title, notes, page_card(config, card))
    asides = write(args.output_dir, page, result.table)
    logger.info("monitor: %s", result.verdict)
    lines = [f"also: {action.words}" for action in result.actions[1:]]
    if any(x.name == "recalibrate" for x in result.actions):  # a page is shared: no path
        lines.append(f"to recalibrate: {update_command(args.checkpoint, config, name, datasets)}")
    lines += [*notes, *(f"earlier file moved to {path}" for path in asides)]
    logger.info("%s", "\n".join([*lines, f"page: {args.output_dir / PAGE}"]))
    return EXIT_DONE


def threshold_of(config: Config, name: str, given: str | None) -> float:
    """Return the threshold of a model; ``given`` is that of ``predict``."""
    if given is not None:
        goal, threshold = parse_threshold(given)
        if goal:
            raise InputError(f"--threshold '{given}': give the risk")
        return threshold
    is_stage = name == STAGE_NAMES[config["stage"]]
    stored = config["decision"] if is_stage else config["models"][name]
    return float(stored[targets_of_config(config)[0].name]["threshold"])


def check_predictions(rows: pd.DataFrame, threshold: float) -> None:
    """Refuse predictions by another threshold."""
    predicted = rows["prediction"].dropna()
    if others := int((predicted != (rows["risk"] >= threshold)[predicted.index]).sum()):
        raise InputError(
            f"monitor: {others:,} predictions are not by the threshold {threshold:.4g}: give "
            "that of predict by --threshold, or leave out the files of another model"
        )


def write(folder: Path, page: Page, table: pd.DataFrame) -> list[Path]:
    """Write page and table; return where earlier ones were moved."""
    files.make_output_dir(folder)
    paths = [folder / PAGE, folder / "monitor.csv"]
    with files.locked(paths[0]):
        asides = files.move_aside(paths)
        write_report(paths[0], page)
        files.write_text(paths[1], table.to_csv(index=False))
    return asides


def update_command(checkpoint: Path, config: Config, name: str, datasets: Mapping[str, Any]) -> str:
    """Return the command that recalibrates a model on newly labelled rows."""
    flag = datasets[config["dataset"]].source_flag
    words = ["medgemma-clinical", "predict", "--checkpoint", str(checkpoint)]
    words += [f"--{flag}", "LABELLED_ROWS", "--predictions", "UPDATE.csv"]
    words += ["--update", str(checkpoint.with_name(f"{checkpoint.stem}_updated"))]
    if name != STAGE_NAMES[config["stage"]]:
        words += ["--use", trained_model.column_ending(name, STAGE_NAMES[config["stage"]])]
    return shlex.join(words)


# ------------------------------------------------------------------ what is read


class Scored(NamedTuple):
    """Predictions of one model, and what lies beside them."""

    rows: pd.DataFrame  # columns of the files, and risk, prediction, date, unscored
    inputs: pd.DataFrame | None  # last values; None where a file has none
    name: str  # of the model
    notes: list[str]


def read_scored(paths: Sequence[Path], checkpoint: Path, use: str | None, config: Config) -> Scored:
    """Read files of predictions of a checkpoint."""
    scored = [read_file(path, checkpoint, use, config) for path in paths]
    names = {file.name for file in scored}
    if len(names) > 1:
        raise InputError(f"monitor: the risks are of {' and of '.join(names)}: give --use")
    rows = pd.concat([file.rows for file in scored], ignore_index=True)
    if rows["unscored"].all():
        raise InputError(f"{paths[0]}: no row has a score")
    inputs = None
    if all(file.inputs is not None for file in scored):
        inputs = pd.concat([file.inputs for file in scored], ignore_index=True)
    return Scored(rows, inputs, scored[0].name, [note for file in scored for note in file.notes])


def read_file(path: Path, checkpoint: Path, use: str | None, config: Config) -> Scored:
    """Read a file of predictions of a checkpoint."""
    table = read_table(path, ["id", "probability", PREDICTED_AT])
    try:
        table, model = named_model(table)
    except ValueError as error:
        raise InputError(f"{path}: {error}: give the rows of one") from error
    notes = []
    if model is None:
        notes = [f"{path.name} has no column {MODEL}, so nothing tells that one model made it"]
    elif model != trained_model.read_model_sha256(checkpoint):
        problem = f"is of another model than --checkpoint {checkpoint}"
        raise InputError(f"{path}: {problem}: judge it by its own checkpoint")
    column, name = risk_column(table, path, use, config)
    risk = parse(table, path, column, "risk")
    prediction: Any = np.nan
    if column == "probability" and "prediction" in table:
        prediction = parse(table, path, "prediction", "label")
    date = parse(table, path, PREDICTED_AT, "date")
    rows = table.assign(risk=risk, prediction=prediction, date=date, unscored=risk.isna())
    beside = inputs_path(path)
    inputs = read_inputs(beside, table) if beside.is_file() else None
    return Scored(rows, inputs, name, notes)


def join_outcomes(
    everyone: pd.DataFrame,  # of ``Scored``
    outcomes: pd.DataFrame,  # by id
    target: Target,
) -> tuple[pd.DataFrame, list[str]]:
    """Return a prediction of each id with its outcome, and what was left out."""
    # A row without a score may have been predicted again, once its values had come.
    rows = everyone.sort_values(["unscored", "date"], kind="stable").drop_duplicates("id")
    of_rows = outcomes.reindex(rows["id"]).set_axis(rows.index)
    is_early = of_rows["date"] < rows["date"] - YEAR
    counts = {
        "later predictions of the same id, left out": len(everyone) - len(rows),
        "patients without a score": rows["unscored"].sum(),
        "patients without a line of outcomes": (~rows["id"].isin(outcomes.index)).sum(),
        "ids of outcomes without a prediction": (~outcomes.index.isin(rows["id"])).sum(),
        "dates more than a year before their prediction": is_early.sum(),
    }
    notes = [f"{text}: {count:,}" for text, count in counts.items() if count]
    joined = rows[["risk", "prediction"]].assign(
        label=of_rows["label"], date=of_rows["date"].fillna(rows["date"])
    )
    if not target.horizon:
        return joined, notes
    joined["ended"] = of_rows["ended"].fillna(value=False).astype(bool)
    joined, shares = after_horizon(joined, target)
    return joined, [*notes, *shares]


def read_outcomes(
    path: Path, date_column: str, newest: pd.Timestamp, target: Target
) -> pd.DataFrame:
    """Return label, ``ended`` and date beside the columns of a file of outcomes, by id."""
    table = read_table(path, ["id", date_column])
    is_again = table["id"].duplicated()
    if is_again.any():
        line = int(is_again.argmax()) + 2
        raise InputError(f"{path}: line {line}: an id that stands twice: leave one")
    dates = parse(table, path, date_column, "date")
    check_dates(dates, newest, f"{path}: column {date_column}")
    labels = known_labels(table, path, target)
    return table.assign(**labels, date=dates).set_index("id")


def after_horizon(rows: pd.DataFrame, target: Target) -> tuple[pd.DataFrame, list[str]]:
    """Leave out the status of rows whose horizon has not passed, and rows that ended early."""
    # An event is known earlier than its absence: before the horizon neither counts.
    now = max(present(), rows["date"].max())
    is_day = rows["date"] == rows["date"].dt.normalize()  # whose end counts
    begin = rows["date"] + pd.to_timedelta(is_day.astype(int), unit="D")
    waits = begin + pd.Timedelta(hours=target.horizon) > now
    ended = rows["ended"] & ~waits
    rows = rows.assign(label=rows["label"].mask(waits))
    shares = {
        "not known yet": rows["label"].isna() & ~ended,
        "never known, left out": ended,
    }
    notes = [f"{target.title}: {100 * share.mean():.1f} % {text}" for text, share in shares.items()]
    return rows[~ended], notes


def sites_of(rows: pd.DataFrame, outcomes: pd.DataFrame, column: str, path: Path) -> pd.Series[Any]:
    """Return the site of each row by a column of the outcomes, or of the predictions."""
    source = outcomes if column in outcomes else rows.set_index("id")
    if column not in source:
        raise InputError(f"--site {column}: {path}: line 1: no such column")
    sites = source[column].reindex(rows["id"]).set_axis(rows.index)
    return sites.replace("", None).fillna("unknown")


def known_labels(outcomes: pd.DataFrame, path: Path, target: Target) -> dict[str, pd.Series[Any]]:
    """Return the column label, or what columns of times say of a target; NaN where unknown.

    ``ended``: whose follow-up ended too early to know it ever.
    """
    columns = {"event_hours": "event_hours", target.event: "event"}
    if "label" in outcomes or not columns.keys() & {*outcomes}:
        if "label" not in outcomes:
            raise InputError(f"{path}: line 1: no column label")
        labels = parse(outcomes, path, "label", "label")
        return {"label": labels, "ended": pd.Series(data=False, index=labels.index)}
    if missing := [name for name in columns if name not in outcomes]:
        raise InputError(f"{path}: line 1: no column {missing[0]}")
    times = pd.DataFrame({k: parse(outcomes, path, k, form) for k, form in columns.items()})
    rows, labels = times.dropna(), pd.Series(np.nan, times.index)
    labels[rows.index] = target.labels(rows)
    return {"label": labels, "ended": labels.isna() & times.notna().all(axis=1)}


def check_dates(dates: pd.Series[Any], newest: pd.Timestamp, column: str) -> None:
    """Refuse dates of outcomes after today; a year after ``newest`` where that is later still."""
    last, text = latest_now(), "after today"
    if newest > last:  # shifted dates
        last, text = newest + YEAR, "more than a year after the last prediction"
    if (late := dates > last).any():
        first = int(late.to_numpy().argmax()) + 2
        raise InputError(f"{column}: {int(late.sum()):,} dates {text}, first in line {first}")


def latest_now() -> pd.Timestamp:
    """Return the local time where it is latest, as if it were UTC."""
    return present() + AHEAD


def present() -> pd.Timestamp:
    """Return the present time."""
    return pd.Timestamp.now("UTC")


def read_inputs(path: Path, predictions: pd.DataFrame) -> pd.DataFrame:
    """Read the last values beside some predictions, NaN where not measured."""
    table = read_table(path, ["id"])
    if table["id"].tolist() != predictions["id"].tolist():
        raise InputError(f"{path}: its ids are not those of the predictions: take both of one run")
    names = [name for name in table if f"{name} measured" in table]
    return table[names].apply(pd.to_numeric, errors="coerce")


def risk_column(
    table: pd.DataFrame, path: Path, use: str | None, config: Config
) -> tuple[str, str]:
    """Return the column of a model's risks, and its name; without ``use`` that of probability."""
    stage, output = STAGE_NAMES[config["stage"]], targets_of_config(config)[0].output
    names = [*config.get("models", {}), stage]
    endings = {name: trained_model.column_ending(name, stage) for name in names}
    columns = {name: f"{output}_{ending}" for name, ending in endings.items()}
    if columns[stage] not in table:
        columns[stage] = "probability"
    columns = {name: column for name, column in columns.items() if column in table}
    if use is None:
        chosen = [x for x in columns if table[columns[x]].equals(table["probability"])]
    else:
        wanted = trained_model.column_ending(trained_model.wanted_model(config, use), stage)
        chosen = [x for x in columns if endings[x] == wanted]
    if not chosen:
        choices = ", ".join(endings[name] for name in columns)
        raise InputError(f"{path}: no column of this model: choose by --use from {choices}")
    return columns[chosen[-1]], chosen[-1]
