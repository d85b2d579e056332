"""Read the test predictions of finished runs and compare them: ``--compare``."""

from __future__ import annotations

import json
import logging
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.run_folder import read_run
from medgemma_clinical.evaluation.baselines import MEANINGS, STAGE_NAMES
from medgemma_clinical.evaluation.metrics_table import TESTED, Metrics, evaluate
from medgemma_clinical.evaluation.report import write_comparison
from medgemma_clinical.evaluation.tables import counts_text, model_table
from medgemma_clinical.files import InputError, move_aside, read_json, write_json
from medgemma_clinical.models.language_model import TINY
from medgemma_clinical.models.model_card import RANDOM_MODEL, RANDOM_MODEL_UNREAD
from medgemma_clinical.provenance import describe_program

logger = logging.getLogger(__name__)


def run_compare(args: Namespace, output_dir: Path | None) -> int:
    """Print the test metrics of finished stages and their paired differences to the first.

    Args:
        args: of the command line: ``compare`` names stage folders tested on the same patients.
        output_dir: where ``compare.json`` and ``compare.html`` are written; None writes nothing.

    Raises:
        InputError: a run is named twice or has no result, or they were tested on other patients.
    """
    runs = [Path(os.path.abspath(run)) for run in args.compare]  # "." has a name too
    if len(runs) < 2 or len({run.resolve() for run in runs}) < len(runs):
        raise InputError("--compare: name at least two different folders of stages")
    folders = dict(zip(model_names(runs), runs, strict=True))
    metrics = evaluate(join_predictions(folders), args.seed)
    cost = {name: cost_of(folder) for name, folder in folders.items()}
    if output_dir is None:
        log_comparison(metrics, cost)
        return EXIT_DONE
    output_dir.mkdir(parents=True, exist_ok=True)
    known = {name: read_run(folder) or {} for name, folder in folders.items()}
    outcomes = dict.fromkeys(run["data"]["outcome"] for run in known.values() if "data" in run)
    write_results(
        output_dir / "compare",
        metrics,
        cost,
        title=": ".join([f"{len(folders)} models on the same test patients", *outcomes]),
        card={"Seed": f"{args.seed}, of the intervals"},
        notice=random_models_notice(
            {name: run.get("arguments", {}) for name, run in known.items()}
        ),
    )
    return EXIT_DONE


def model_names(runs: Sequence[Path]) -> list[str]:
    """Return the stages in words where one folder holds all runs, else their paths below it."""
    shared = Path(os.path.commonpath([run.parent for run in runs]))
    names = [run.relative_to(shared).as_posix() for run in runs]
    if any(run.parent != shared for run in runs):
        return names
    return [STAGE_NAMES.get(name, name) for name in names]


def read_predictions(folder: Path, model: str = "probability") -> pd.DataFrame:
    """Read the test predictions of a folder: the columns ``TESTED``, then the risk of each model.

    Args:
        folder: of a stage, or of an ablation, which has no column ``probability``.
        model: new name of the column ``probability``.

    Raises:
        InputError: there is no such table, or a risk is no number from 0 to 1.
    """
    path = folder / "predictions_test.csv"
    try:
        if not path.is_file():
            raise ValueError("no such file")
        table = pd.read_csv(path, dtype={"id": str, "patient": str}, keep_default_na=False)
        if model != "probability":
            table = table.rename(columns={"probability": model}, errors="raise")
        table = table[[*TESTED, *table.columns.drop(TESTED)]]
        numbers = table.drop(columns=["id", "patient"]).astype(float)
        if not (numbers.ge(0) & numbers.le(1)).all(axis=None) or len(numbers.columns) < 2:
            raise ValueError("a risk is no number from 0 to 1")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: no test predictions: name the folder of a finished stage"
        ) from error
    return table.astype(numbers.dtypes)


def join_predictions(folders: Mapping[str, Path]) -> pd.DataFrame:
    """Join the test predictions of several stages, by name; the baselines are the first one's.

    Raises:
        InputError: they were not tested on the same patients.
    """
    tables = {name: read_predictions(folder, name) for name, folder in folders.items()}
    reference, first = next(iter(tables.items()))
    data = {name: (read_run(folder) or {}).get("data", {}) for name, folder in folders.items()}
    for name, table in tables.items():
        if not table[TESTED].equals(first[TESTED]):
            both = len(set(table["id"]) & set(first["id"]))
            raise InputError(
                f"{reference} and {name} were tested on other patients or labels ({len(first)} and "
                f"{len(table)} rows, {both} ids in both): compare runs on the same data and seed"
            )
        numbered = not all(each.get("named", True) for each in (data[reference], data[name]))
        if numbered and data[reference].get("rows_sha256") != data[name].get("rows_sha256"):
            raise InputError(
                f"{reference} and {name}: their data have no subject_id and differ, so nothing "
                "tells that the same patients were tested"
            )
    risks = [table[name] for name, table in tables.items()]
    return pd.concat(
        [first[TESTED], *risks, first.drop(columns=[*TESTED, *tables], errors="ignore")], axis=1
    )


def cost_of(folder: Path) -> dict[str, float | None]:
    """Return what a finished stage has cost; empty where its folder does not say.

    Returns:
        seconds_an_epoch (median, with validation), tokens (mean, of a training patient),
        memory_mib (peak), residual_weight (of the language model).
    """
    try:
        lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = float(np.median([json.loads(line)["seconds"] for line in lines]))
        known = (read_run(folder) or {})["cost"]
        weight = read_json(folder / "metrics.json").get("residual_weight")
        cost = {"seconds_an_epoch": seconds, **known, "residual_weight": weight}
        return {name: None if x is None else float(x) for name, x in cost.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_results(
    path: Path,
    metrics: Metrics,
    cost: dict[str, dict[str, float | None]],
    *,
    title: str,
    card: dict[str, str],
    notice: str = "",
    meanings: Mapping[str, str] | None = None,
    sentences: Sequence[str] = (),
    splits: pd.DataFrame | None = None,
) -> None:
    """Log a comparison, and write it as ``PATH.json`` and ``PATH.html``.

    An earlier result that differs is moved aside first.
    """
    pages = [path.with_name(f"{path.name}.{ending}") for ending in ("json", "html")]
    content = {**metrics.to_json(), "cost": cost}
    try:
        same = read_json(pages[0]) == content
    except (OSError, ValueError):
        same = False
    if not same:
        for aside in move_aside(pages):
            logger.info("an earlier result was moved to %s", aside)
    known = {**MEANINGS, **(meanings or {})}
    unused = [name for name, each in cost.items() if each.get("residual_weight") == 0]
    if unused:
        said = f"The language model has weight 0 beside stage 1 in: {', '.join(unused)}."
        sentences = [*sentences, said]
    write_comparison(
        pages[1],
        metrics,
        title=title,
        sentences=sentences,
        card={**card, **describe_program()},
        models={name: known[name] for name in metrics.models if name in known},
        notice=notice,
        cost=pd.DataFrame.from_dict(cost, orient="index"),
        splits=splits,
    )
    write_json(pages[0], content)
    log_comparison(metrics, cost)
    logger.info("%s\nresults: %s", "\n".join(sentences), path.parent)


def log_comparison(metrics: Metrics, cost: dict[str, dict[str, float | None]]) -> None:
    """Log the table of the models and on how many rows it rests."""
    table = model_table(metrics, pd.DataFrame.from_dict(cost, orient="index"))
    counts = counts_text(metrics.counts["n"], metrics.counts["events"])
    logger.info("\n%s\ntest: %s", table.to_string(index=False), counts)


def random_models_notice(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what a page says first where runs have the built-in random model; else nothing.

    Args:
        runs: the arguments of each by its name; none where they are not known.
    """
    tiny = [name for name, run in runs.items() if run.get("model_name") == TINY]
    readers = [name for name, run in runs.items() if not run.get("trajectory_only")]
    random = [name for name in tiny if name in readers]
    if not readers:
        return RANDOM_MODEL_UNREAD if len(tiny) == len(runs) else ""
    if random == readers:
        return RANDOM_MODEL
    names = " and ".join(random)
    return (
        f"The language model of {names} is tiny and random; its metrics say nothing about MedGemma."
        if random
        else ""
    )
