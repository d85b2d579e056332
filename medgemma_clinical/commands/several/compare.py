"""Read the test predictions of finished runs and compare them: ``--compare``."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.run_folder import read_run
from medgemma_clinical.commands.several.earlier_stages import changed_stage1
from medgemma_clinical.commands.several.runs import random_models_notice, run_figures
from medgemma_clinical.data.small_cells import counting_rule
from medgemma_clinical.evaluation.baselines import STAGE_1, STAGE_2
from medgemma_clinical.evaluation.cohort import SAME_RISK
from medgemma_clinical.evaluation.comparison import (
    TESTED,
    compare_models,
    comparison_table,
    counts_sentence,
    write_comparison,
)
from medgemma_clinical.evaluation.report import STAGE_NAMES
from medgemma_clinical.files import InputError, file_hash
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE

logger = logging.getLogger(__name__)


def run_compare(runs: list[Path], seed: int, fewest: int, output_dir: Path | None = None) -> int:
    """Print the test figures of finished stages and their paired differences to the first.

    Args:
        runs: stage folders that were tested on the same patients.
        seed: of the bootstrap.
        fewest: patients of the smallest cell that is shown.
        output_dir: where ``compare.json``, ``.png`` and ``.html`` are written; None writes nothing.

    Raises:
        InputError: a run is named twice or has no result, or they were tested on other patients.
    """
    if len(runs) < 2 or len({run.resolve() for run in runs}) < len(runs):
        raise InputError("--compare: name at least two different folders of stages")
    runs = [Path(os.path.abspath(run)) for run in runs]  # "." has a name too
    folders = dict(zip(model_names(runs), runs, strict=True))
    changed = changed_stage1(folders)
    for line in changed.values():
        logger.warning("warning: %s", line)
    reference = next(iter(folders))
    results = compare_models([join_predictions(folders)], reference, seed, fewest)
    for name, run in folders.items():
        results[name] |= known_figures(run)
        if name != reference and changed.keys() & {name, reference}:
            results[name]["unjudged"] = True
    if output_dir is None:
        table = comparison_table(results, reference).to_string(index=False)
        logger.info("%s\n%s", table, counts_sentence(results))
        return EXIT_DONE
    output_dir.mkdir(parents=True, exist_ok=True)
    known = {name: read_run(run) or {} for name, run in folders.items()}
    outcomes = dict.fromkeys(run["data"]["outcome"] for run in known.values() if "data" in run)
    title = f"{len(folders)} finished models on the same test patients"
    write_comparison(
        output_dir,
        "compare",
        results,
        reference,
        asked=list(folders)[1:],
        title=": ".join([title, *outcomes]),
        sentences=[],
        warnings=list(changed.values()),
        models={
            name: f"the one in the report of {reference}; none of the compared runs"
            for name in results
            if name not in folders and name.endswith((STAGE_1, STAGE_2))
        },
        notice=random_models_notice(
            {name: run.get("arguments", {}) for name, run in known.items()}
        ),
        card={"Seed": f"{seed}, of the intervals", "Small cells": counting_rule(fewest)},
    )
    return EXIT_DONE


def known_figures(folder: Path) -> dict[str, float | None]:
    """Return cost and weight of a finished stage; empty where the folder lacks the files of them.

    Predictions can be compared without them, and other programs may have written the files.
    """
    try:
        figures = run_figures(folder) if read_run(folder) else {}
        return {name: None if each is None else float(each) for name, each in figures.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def model_names(runs: Sequence[Path]) -> list[str]:
    """Return the stages in words where one folder holds all runs, else their paths below it."""
    shared = Path(os.path.commonpath([run.parent for run in runs]))
    names = [run.relative_to(shared).as_posix() for run in runs]
    if any(run.parent != shared for run in runs):
        return names
    return [STAGE_NAMES.get(name, name) for name in names]


def read_predictions(folder: Path, model: str = "probability") -> pd.DataFrame:
    """Read the test predictions of a folder, with ids and patients as text.

    Args:
        folder: of a stage, or of an ablation.
        model: new name of the column ``probability`` that a stage has.

    Returns:
        The columns ``TESTED``, then the probabilities of each model and baseline.

    Raises:
        InputError: there is no such table.
    """
    path = folder / "predictions_test.csv"
    try:
        table = pd.read_csv(path, dtype={"id": str, "patient": str}, keep_default_na=False)
        if model != "probability":
            table = table.rename(columns={"probability": model}, errors="raise")
        return table[[*TESTED, *table.columns.drop(TESTED)]]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: no test predictions: name the folder of a finished stage"
        ) from error


def join_predictions(folders: dict[str, Path]) -> pd.DataFrame:
    """Join the test predictions of several stages, with the baselines of the first.

    An earlier stage among these baselines is left out where it is one of the compared models; of
    another training it is called "other", where one of the models has its name.

    Args:
        folders: stage folder of each model, by the model's name; the first is the reference.

    Returns:
        The columns ``TESTED``, then the probabilities of each model and baseline.

    Raises:
        InputError: they were not tested on the same patients.
    """
    tables = {name: read_predictions(folder, name) for name, folder in folders.items()}
    reference, first = next(iter(tables.items()))
    for name, table in tables.items():
        _check_named_patients(reference, folders[reference], name, folders[name])
        _check_same_rows(reference, first, name, table)
    models = [table[name] for name, table in tables.items()]
    compared = _compared_baselines(folders, tables)
    baselines = first.drop(columns=[*TESTED, reference, *compared], errors="ignore")
    baselines = baselines.rename(columns={name: f"other {name}" for name in folders})
    return pd.concat([first[TESTED], *models, baselines], axis=1)


def _compared_baselines(folders: dict[str, Path], tables: dict[str, pd.DataFrame]) -> set[str]:
    """Return the earlier stages among the baselines of the first run that are compared themselves.

    Stage 1 is known by the hash of its file, stage 2 by its risks, which were copied from its
    folder.
    """
    reference, first = next(iter(tables.items()))
    digest, found = (read_run(folders[reference]) or {}).get("stage_1_sha256"), set()
    for name, folder in folders.items():
        path = folder.parent / TRAJECTORY_FILE
        if folder.name == "trajectory" and path.is_file() and file_hash(path) == digest:
            found.add(STAGE_1)
        if folder.name == "classification" and STAGE_2 in first.columns.drop(reference):
            risks = tables[name][name]
            if np.allclose(risks, first[STAGE_2], rtol=0, atol=SAME_RISK):
                found.add(STAGE_2)
    return found


def _check_same_rows(reference: str, first: pd.DataFrame, name: str, table: pd.DataFrame) -> None:
    """Raise ``InputError`` where two tables differ in rows, patients or labels."""
    if table[TESTED].equals(first[TESTED]):
        return
    if table[["id", "patient"]].equals(first[["id", "patient"]]):
        raise InputError(f"{reference} and {name} have other labels for the same patients")
    both = len(set(table["id"]) & set(first["id"]))
    raise InputError(
        f"{reference} and {name} were tested on different patients ({len(first)} and "
        f"{len(table)} rows, {both} ids in both): compare runs on the same data and seed"
    )


def _check_named_patients(reference: str, one: Path, name: str, other: Path) -> None:
    """Raise ``InputError`` where rows are known by number alone and the data are not the same."""
    data = [(read_run(folder) or {}).get("data", {}) for folder in (one, other)]
    numbered = any(not facts.get("named", True) for facts in data)
    if numbered and data[0].get("rows_sha256") != data[1].get("rows_sha256"):
        raise InputError(
            f"{reference} and {name}: their data name no patients (no subject_id) and are not the "
            "same, so nothing tells that the same patients were tested"
        )
