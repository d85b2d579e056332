"""``compare``: the test predictions of finished runs, paired."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from argparse import Namespace
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.commands.command_line import EXIT_DONE, SEED, Table
from medgemma_clinical.commands.prediction_files import read_predictions, read_targets
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, WITH_TEXT, meanings
from medgemma_clinical.evaluation.metrics_table import Metrics, evaluate
from medgemma_clinical.evaluation.report import comparison_page, write_report
from medgemma_clinical.evaluation.tables import model_table
from medgemma_clinical.evaluation.target import LABEL, NO_RISKS, Target, is_risk, read_weights
from medgemma_clinical.evaluation.verdicts import counts_text
from medgemma_clinical.files import InputError, make_output_dir, move_aside, read_json, write_json
from medgemma_clinical.flags import Flag
from medgemma_clinical.models.choices import DEMO
from medgemma_clinical.models.terms import built_in_sentence
from medgemma_clinical.provenance import HISTORY, describe_program, read_run

logger = logging.getLogger(__name__)


RUNS = "stage folders; the first is the reference"
FLAGS: Table = {
    "what to compare": (
        Flag("runs", Path, help=RUNS, several=True, positional=True),
        Flag("primary", help="baseline of the planned comparison"),
        Flag("output_dir", Path, help="folder of compare.html; none is written without"),
        SEED,
    ),
}


def run(args: Namespace) -> int:
    """Compare finished stages."""
    return compare(args.runs, args.output_dir, args.seed, args.primary)


def compare(
    folders_of_runs: Sequence[Path], output_dir: Path | None, seed: int, primary: str | None
) -> int:
    """Compare the first finished stage with each other one on the test patients that they share."""
    runs = [Path(os.path.abspath(run)) for run in folders_of_runs]  # "." has a name too
    if len(runs) < 2 or len({run.resolve() for run in runs}) < len(runs):
        raise InputError("compare: name at least two different folders of stages")
    folders = dict(zip(model_names(runs), runs, strict=True))
    table, targets = join_predictions(folders)
    names = [x for x in targets[0].models(table) if x not in (next(iter(folders)), ENSEMBLE)]
    if primary and primary not in names:
        raise InputError(f"--primary {primary}: choose from {', '.join(names)}")
    primary = primary or primary_of(runs[0])
    metrics = evaluate(table, seed, primary=primary, compared=[*folders], targets=targets)
    cost = {name: cost_of(folder) for name, folder in folders.items()}
    if output_dir is None:
        log_comparison(metrics, cost, targets)
        return EXIT_DONE
    make_output_dir(output_dir)
    records = {name: read_run(folder) or {} for name, folder in folders.items()}
    outcomes = dict.fromkeys(run["data"]["outcome"] for run in records.values() if "data" in run)
    arguments = {name: run.get("arguments", {}) for name, run in records.items()}
    save_comparison(
        output_dir / "compare",
        metrics,
        cost,
        targets,
        title=": ".join([f"{len(folders)} models on the same test patients", *outcomes]),
        card={"Seed": f"{seed}, of the intervals"},
        notice=built_in_models_notice(arguments),
    )
    return EXIT_DONE


def primary_of(folder: Path) -> str | None:
    """Return the baseline that a finished stage was compared with; None where unknown."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return str(read_json(folder / "metrics.json")["test"]["primary"])
    return None


def model_names(runs: Sequence[Path]) -> list[str]:
    """Return the stages in words where one folder holds all runs, else their paths below it."""
    shared = Path(os.path.commonpath([run.parent for run in runs]))
    names = [run.relative_to(shared).as_posix() for run in runs]
    if any(run.parent != shared for run in runs):
        return names
    return [STAGE_NAMES.get(name, name) for name in names]


BESIDE = (ENSEMBLE, WITH_TEXT)
"""What differs between runs of one split, though it bears one name."""


def beside_runs(names: Iterable[str]) -> list[str]:
    """Return the names of ``BESIDE`` of several runs."""
    return [f"{name}, {beside}" for name in names for beside in BESIDE]


def join_predictions(
    folders: Mapping[str, Path],
    with_beside: Collection[str] = (),  # runs of which ``BESIDE`` is joined, too
) -> tuple[pd.DataFrame, tuple[Target, ...]]:
    """Join test predictions of the same patients by name; the baselines are the first stage's.

    Returns also what they are about, with the weights of the first stage.
    """
    about = {name: read_targets(folder) for name, folder in folders.items()}
    tables = {name: read_predictions(folder, name, about[name]) for name, folder in folders.items()}
    data = {name: (read_run(folder) or {}).get("data", {}) for name, folder in folders.items()}
    reference, first = next(iter(tables.items()))
    targets = about[reference]
    tested = [name for name in NO_RISKS if name in first]
    for name, table in tables.items():
        if about[name] != targets:
            raise InputError(f"{reference} and {name} are about other events or horizons")
        if not table[tested].equals(first[tested]):
            both = len(set(table["id"]) & set(first["id"]))
            raise InputError(
                f"{reference} and {name} were tested on other patients or labels ({len(first)} and "
                f"{len(table)} rows, {both} ids in both): compare runs on the same data and seed"
            )
        has_ids = all(run.get("has_patient_ids", True) for run in (data[reference], data[name]))
        if not has_ids and data[reference].get("rows_sha256") != data[name].get("rows_sha256"):
            raise InputError(
                f"{reference} and {name}: their data have no subject_id and differ, so nothing "
                "tells that the same patients were tested"
            )
    own = {name: [target.column(name) for target in targets] for name in tables}
    risks = [table[own[name]] for name, table in tables.items()]
    joined = {column for columns in own.values() for column in columns}
    others = [x for x in map(str, first) if is_risk(x) and x not in joined]
    for name, beside in itertools.product([x for x in tables if x in with_beside], BESIDE):
        columns = {each.column(beside): each.column(f"{name}, {beside}") for each in targets}
        if {*columns} <= {*tables[name]}:
            risks.append(tables[name][[*columns]].rename(columns=columns))
    whole = pd.concat([first[tested], *risks, first[others]], axis=1)
    return whole, read_weights(targets, first)


def cost_of(folder: Path) -> dict[str, float | None]:
    """Return a stage's cost, empty where unknown: median of epochs, mean of patients, peak."""
    try:
        seconds = pd.read_json(folder / HISTORY, lines=True)["seconds"].median()
        stored = (read_run(folder) or {})["cost"]
        weight = read_json(folder / "metrics.json").get("residual_weight")
        cost = {"seconds_an_epoch": seconds, **stored, "residual_weight": weight}
        return {name: None if x is None else float(x) for name, x in cost.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save_comparison(
    path: Path,
    metrics: Metrics,
    cost: dict[str, dict[str, float | None]],
    targets: Sequence[Target] = (LABEL,),
    *,
    card: dict[str, str],
    variants: Mapping[str, str] = {},  # what they are
    sentences: Sequence[str] = (),
    **parts: Any,  # others of ``comparison_page``
) -> None:
    """Log a comparison; write ``PATH.json`` and ``PATH.html``; an earlier result is moved aside."""
    table, page = (path.with_name(f"{path.name}.{ending}") for ending in ("json", "html"))
    about = [target.to_json() for target in targets]
    content, earlier = {**metrics.to_json(), "targets": about, "cost": cost}, None
    with contextlib.suppress(OSError, ValueError):
        earlier = read_json(table)
    for aside in move_aside([table, page] if earlier != content else []):
        logger.info("an earlier result was moved to %s", aside)
    if unused := [name for name, numbers in cost.items() if numbers.get("residual_weight") == 0]:
        weight_note = f"Text was not shown to add to stage 1 in: {', '.join(unused)}."
        sentences = [*sentences, weight_note]
    words = {**meanings(of_times=targets[0].horizon > 0), **variants}
    shown = comparison_page(
        metrics,
        targets,
        sentences=sentences,
        card={**card, **describe_program()},
        models={name: words[name] for name in metrics.models if name in words},
        cost=pd.DataFrame.from_dict(cost, orient="index"),
        **parts,
    )
    write_report(page, shown)
    write_json(table, content)
    log_comparison(metrics, cost, targets)
    logger.info("%s\nresults: %s", "\n".join(sentences), path.parent)


def log_comparison(
    metrics: Metrics, cost: dict[str, dict[str, float | None]], targets: Sequence[Target]
) -> None:
    """Log the table of the models and on how many rows it rests."""
    table = model_table(metrics, pd.DataFrame.from_dict(cost, orient="index"), targets)
    logger.info("\n%s\ntest: %s", table.to_string(index=False), counts_text(metrics.counts))


def built_in_models_notice(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what a page says first of runs, given by their arguments, with the built-in model."""
    readers = [name for name, run in runs.items() if not run.get("trajectory_only")]
    users = [name for name in readers if runs[name].get("model_name") == DEMO]
    of = "" if len(users) == len(readers) else f" of {' and '.join(users)}"
    return built_in_sentence(of) if users else ""
