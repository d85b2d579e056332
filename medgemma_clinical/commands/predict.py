"""Score new rows with a trained model: ``--predict``."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from medgemma_clinical.commands.command_line import EXIT_DONE, EXIT_INTERRUPTED
from medgemma_clinical.commands.predict_rows import PredictionTally, count_implausible, score_rows
from medgemma_clinical.data.tables import Findings
from medgemma_clinical.data.trajectories import ScoringRows, TrajectoryDataset
from medgemma_clinical.distributed import SECONDS_A_LINE, processes
from medgemma_clinical.evaluation.cohort import cohort_figures
from medgemma_clinical.evaluation.report import (
    CARD,
    INTERVALS,
    PAGE_MARK,
    STAGE_TITLES,
    ReportContent,
    headline,
    write_report,
)
from medgemma_clinical.evaluation.report_tables import shift_table
from medgemma_clinical.files import InputError, atomic, locked, remove
from medgemma_clinical.models.trained_model import (
    TrainedModel,
    load_trained_model,
    read_trained_config,
)
from medgemma_clinical.provenance import code_hash, git_commit, peak_memory, versions

logger = logging.getLogger(__name__)

TRAJECTORY_ROWS, TEXT_ROWS = 20_000, 2_000
"""Rows of a file in memory at a time, of stage 1 and of those with a text for each row."""

TRAJECTORY_BATCH, TEXT_BATCH = 256, 32
"""Rows a batch without ``--batch_size``."""

PREDICT_FLAGS = frozenset(
    f"--{name}"
    for name in (
        *("predict", "checkpoint", "predictions", "strict", "dataset", "organ", "data_path"),
        *("data_dir", "model_name", "quantization", "precision", "batch_size", "seed"),
        "show_values",
    )
)
"""Flags that ``--predict`` reads; the checkpoint decides all else."""


def predict(
    args: Namespace,
    given: set[str],
    datasets: Mapping[str, type[TrajectoryDataset]],
    encoders: Mapping[str, type],
) -> int:
    """Write a prediction for each row of the input; the output is whole or absent.

    Args:
        args: of the command line.
        given: flags that the user typed, as in ``--batch_size``.
        datasets: class of each data set by the name of ``--dataset``.
        encoders: class of each encoder by its registered name.

    Raises:
        InputError: a flag, the checkpoint, the input, or the place of the output is wrong.
    """
    check_flags(given)
    if processes().num_processes > 1:
        raise InputError("--predict runs in one process: start it by python, not accelerate")
    request = given_only(args, given)
    config = read_trained_config(request.checkpoint)
    if config["dataset"] not in datasets:
        raise InputError(
            f"--checkpoint {request.checkpoint}: trained on data of the kind {config['dataset']}, "
            f"this program reads {', '.join(datasets)}"
        )
    dataset = datasets[config["dataset"]]
    source = find_source(request, config, dataset)
    check_output(request.predictions, source, request.checkpoint)
    findings = Findings(str(source), strict=bool(request.strict))
    text = config["stage"] != "trajectory"
    chunks = dataset.scoring_rows(source, config, findings, TEXT_ROWS if text else TRAJECTORY_ROWS)
    first = next(chunks)  # faults of the input show before a language model is loaded
    trained = load_trained_model(
        request.checkpoint,
        encoders,
        request.model_name,
        request.quantization,
        request.precision,
    )
    batch_size = request.batch_size or (TEXT_BATCH if text else TRAJECTORY_BATCH)
    tally = PredictionTally()
    chunks = show_progress(itertools.chain([first], chunks), source)
    try:
        write_predictions(request.predictions, chunks, trained, findings, tally, batch_size)
    except KeyboardInterrupt as stop:
        logger.error("interrupted: no predictions were written")
        return getattr(stop, "code", EXIT_INTERRUPTED)
    log_summary(tally, findings, trained, request.predictions)
    try:
        report_cohort(tally, trained, first.dataset, request)
    except KeyboardInterrupt as stop:
        logger.error("interrupted: the predictions are written, their figures are not")
        return getattr(stop, "code", EXIT_INTERRUPTED)
    return EXIT_DONE


def check_flags(given: set[str]) -> None:
    """Check that all flags are of use to ``--predict``, and none is missing.

    Raises:
        InputError: naming the flags.
    """
    needed = {
        "--checkpoint": "a run's stage folder or its .pt",
        "--predictions": "the CSV to write",
    }
    missing = [f"{flag} ({meaning})" for flag, meaning in needed.items() if flag not in given]
    also = f"; also missing: {' and '.join(missing)}" if missing else ""
    if unused := sorted(given - PREDICT_FLAGS):
        raise InputError(
            f"--predict has no use for {', '.join(unused)}: leave it out; the checkpoint holds the "
            f"choices of the training{also}"
        )
    if missing:
        raise InputError(f"--predict needs {' and '.join(missing)}")


def given_only(args: Namespace, given: set[str]) -> Namespace:
    """Return the arguments with None for flags that were not typed: the checkpoint has those."""
    absent = {flag.removeprefix("--"): None for flag in PREDICT_FLAGS - given - {"--seed"}}
    return Namespace(**{**vars(args), **absent})


def find_source(
    request: Namespace, config: dict[str, Any], dataset: type[TrajectoryDataset]
) -> Path:
    """Return the file or folder to read, which must be of the checkpoint's kind.

    Raises:
        InputError: naming the difference, or the flag that is missing.
    """
    trained = {"dataset": config["dataset"], "organ": config["reading"].get("organ")}
    for name, value in trained.items():
        asked = getattr(request, name)
        if asked not in (None, value):
            raise InputError(
                f"--{name} {asked}: the checkpoint was trained on {value or config['dataset']}"
            )
    kind = f"the checkpoint was trained on --dataset {config['dataset']}"
    flag = dataset.source_flag
    for other in ("data_path", "data_dir"):
        if other != flag and getattr(request, other) is not None:
            raise InputError(f"--{other}: {kind}: give the rows by --{flag}")
    source: Path | None = getattr(request, flag)
    if source is None:
        raise InputError(f"--predict needs --{flag} (the rows to score): {kind}")
    return source


def check_output(out: Path, source: Path, checkpoint: Path) -> None:
    """Check that predictions, and the report beside them, replace nothing of another origin.

    Raises:
        InputError: naming the file or folder in the way.
    """
    flag = f"--predictions {out}"
    if out.suffix != ".csv":
        raise InputError(f"{flag}: give the name of a .csv file")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"{flag}: give a file in a folder that exists")
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{flag}: that is the file to read: choose another")
    for taken in (source, checkpoint):
        if taken.is_dir() and out.resolve().is_relative_to(taken.resolve()):
            raise InputError(f"{flag}: lies within {taken}: choose another folder")
    if {"run.json", "metrics.json"} & set(os.listdir(out.absolute().parent)):
        raise InputError(f"{flag}: lies in a run's own folder: choose another")
    if out.exists() and not _begins_with(out, "id,probability,prediction"):
        raise InputError(f"{flag}: exists and is no file of predictions: choose another name")
    page = report_path(out)
    if page.is_dir():
        raise InputError(f"{flag}: its report would be {page}, which is a folder")
    if page.exists() and PAGE_MARK not in _beginning(page):
        raise InputError(
            f"{flag}: its report would replace {page}, which this program did not write: choose "
            "another name"
        )


def _beginning(path: Path) -> str:
    """Return the first 2,000 characters of a text file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(2000)


def _begins_with(path: Path, text: str) -> bool:
    return _beginning(path).startswith(text)


def report_path(predictions: Path) -> Path:
    """Return the path of the report on labelled predictions."""
    return predictions.with_suffix(".report.html")


def show_progress(chunks: Iterable[ScoringRows], source: Path) -> Iterator[ScoringRows]:
    """Yield chunks under a bar over the bytes of a file or the rows of a folder.

    Without a terminal a line a minute is logged instead.
    """
    from tqdm import tqdm

    size = source.stat().st_size if source.is_file() else None
    terminal, last = sys.stderr.isatty(), time.monotonic()
    unit = {"unit": "B", "unit_scale": True} if size else {"unit": " rows"}
    with tqdm(desc="predicting", total=size, leave=False, disable=not terminal, **unit) as bar:
        done = 0
        for rows in chunks:
            yield rows
            bar.update(rows.read - done)
            done = rows.read
            if not terminal and time.monotonic() - last >= SECONDS_A_LINE:
                last = time.monotonic()
                share = f"{100 * done / size:.0f} %" if size else f"{done:,} rows"
                logger.info("predicting: %s", share)


def write_predictions(
    path: Path,
    chunks: Iterable[ScoringRows],
    trained: TrainedModel,
    findings: Findings,
    tally: PredictionTally,
    batch_size: int,
) -> None:
    """Score rows chunk by chunk; the file appears when the last one is written.

    Raises:
        InputError: a row cannot be scored and the findings are strict, or another run writes here.
    """
    with (
        locked(path),
        atomic(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        for rows in chunks:
            lines, scored = score_rows(rows, trained, findings, batch_size)
            count_implausible(scored.dataset, findings)
            lines.to_csv(file, index=False, header=tally.rows == 0)
            tally.add(lines, scored)
        remove(report_path(path))  # that of the predictions that are replaced


def log_summary(
    tally: PredictionTally, findings: Findings, trained: TrainedModel, path: Path
) -> None:
    """Log what was found in the input and what was written."""
    findings.log()
    threshold = trained.rule.threshold
    if "decision" not in trained.config:
        logger.warning(
            "the checkpoint has no threshold, since its run was not finished: %g is used", threshold
        )
    logger.info(
        "%s rows: %s scored, %s of them at or above the threshold %g; %s with a problem",
        f"{tally.rows:,}",
        f"{tally.scored:,}",
        f"{tally.positive:,}",
        threshold,
        f"{tally.rows - tally.scored:,}",
    )
    logger.info("predictions: %s; %s", path, peak_memory())


def report_cohort(
    tally: PredictionTally, trained: TrainedModel, dataset: TrajectoryDataset, request: Namespace
) -> None:
    """Write and print how good the predictions are, where labels are known."""
    rows, events = tally.labelled, tally.events
    if events in (0, rows):
        if rows:
            logger.info("%s labelled rows of one class only: no figures", f"{rows:,}")
        return
    config = trained.config
    cohort, mix = tally.cohort()
    figures = cohort_figures(cohort, trained.rule.threshold, request.seed)
    content = ReportContent(
        title=f"{STAGE_TITLES[config['stage']]}, on other rows: {config['outcome']}",
        outcome=config["outcome"],
        question=dataset.asked(),
        data={
            "Source": Path(dataset.source).name,
            "Rows read": f"{tally.rows:,}",
            "Rows scored": f"{tally.scored:,}",
            "Scored rows with a label": f"{rows:,}, judged here",
            "Missing values": "masked, never filled in",
        },
        card=model_card(config, request),
        shift=shift_table(config["case_mix"], mix),
    )
    path = report_path(request.predictions)
    sentences = write_report(path, cohort, figures, content)
    counts = {"rows with a label": f"{rows:,}", "events": f"{events:,}"}
    lines = counts | {name: figure for name, figure, _ in headline(figures)}
    logger.info(
        "\n%s\n\n%s\nThese figures flatter the model if it was trained on some of these patients.\n"
        "report: %s",
        "\n".join(f"{name + ':':<20}{figure}" for name, figure in lines.items()),
        sentences,
        path,
    )


def model_card(config: dict[str, Any], request: Namespace) -> dict[str, str]:
    """Return what a reader of figures on other rows must know of the model."""
    base = config.get("base_model")
    return {
        **CARD,
        "Limits": (
            "The model was not changed for these rows: threshold and recalibration are those of "
            "its own validation part. If it was trained on some of these patients, the figures "
            "flatter it."
        ),
        "Model": STAGE_TITLES[config["stage"]] + (f", {base}" if base else ""),
        "Checkpoint": str(request.checkpoint),
        "Intervals": INTERVALS,
        "Seed": f"{request.seed}, of the intervals",
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "SHA-256 of its training data": config["data_sha256"],
        "SHA-256 of the code": code_hash(),
        "Commit": git_commit() or "not known",
    }
