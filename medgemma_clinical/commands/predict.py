"""Score new rows with a trained model, and judge it where they have labels: ``--predict``."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.patients import (
    PatientChoice,
    choose_patients,
    explain_patients,
    patients_path,
)
from medgemma_clinical.commands.run_folder import read_run
from medgemma_clinical.data.case_mix import bands_of, case_mix_of
from medgemma_clinical.data.checks import flow_lines
from medgemma_clinical.data.scoring import ScoringRows
from medgemma_clinical.data.small_cells import counting_rule
from medgemma_clinical.data.tables import Findings
from medgemma_clinical.data.texts import is_formula
from medgemma_clinical.data.training_data import patient_hashes, row_hashes
from medgemma_clinical.data.trajectories import FLOW_COLUMNS, TrajectoryDataset
from medgemma_clinical.distributed import peak_memory, processes
from medgemma_clinical.evaluation.cohort import Cohort, cohort_figures
from medgemma_clinical.evaluation.judgement.overlap import find_overlap
from medgemma_clinical.evaluation.report import (
    CARD,
    INTERVALS,
    PAGE_MARK,
    STAGE_NAMES,
    STAGE_TITLES,
    ReportContent,
    headline,
    write_report,
)
from medgemma_clinical.evaluation.report_tables import counts_text, flow_table, shift_table
from medgemma_clinical.files import InputError, atomic, file_hash, locked, remove
from medgemma_clinical.inference.scoring import count_implausible, prediction_table, scoring_rows
from medgemma_clinical.inference.trajectory_model import MEMORY_ROWS, TrajectoryModel
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory
from medgemma_clinical.models.sharing.model_card import random_model_notice, weight_0_sentence
from medgemma_clinical.models.trained_model import (
    TrainedModel,
    check_no_control,
    checkpoint_path,
    read_trained_config,
)
from medgemma_clinical.provenance import code_hash, git_commit, versions

logger = logging.getLogger(__name__)

HEADERS = (
    "id,probability,prediction,problem\n",
    "id,probability,prediction,report,problem\n",
)
"""First lines of files of predictions."""


def predict(args: Namespace, given: set[str]) -> int:
    """Write a prediction for each row of the input; the output is whole or absent.

    Args:
        args: of the command line.
        given: flags that the user typed, as in ``--batch_size``.

    Raises:
        InputError: a flag, the checkpoint, the input, or the place of the output is wrong.
    """
    if processes().num_processes > 1:
        raise InputError("--predict runs in one process: start it by python, not accelerate")
    # What was not typed is the checkpoint's to decide, whatever the default of the training.
    typed = {name: x if f"--{name}" in given else None for name, x in vars(args).items()}
    own = {name: getattr(args, name) for name in ("seed", "min_cell", "attention", "explain")}
    request = Namespace(**{**typed, **own})
    config = read_trained_config(request.checkpoint)
    datasets = TrajectoryModel.program.datasets
    if config["dataset"] not in datasets:
        raise InputError(
            f"--checkpoint {request.checkpoint}: trained on --dataset {config['dataset']}, which "
            "this program does not have"
        )
    check_no_control(request.checkpoint, config)
    source = find_source(request, config, datasets)
    check_output(request.predictions)
    choice = choose_patients(request)
    findings = Findings(str(source), strict=bool(request.strict))
    chunks = scoring_rows(source, config, datasets, findings, MEMORY_ROWS[config["stage"]])
    first = next(chunks)  # faults of the input show before a language model is loaded
    model = TrajectoryModel.from_pretrained(
        request.checkpoint,
        batch_size=request.batch_size,
        model_name=request.model_name,
        quantization=request.quantization,
        precision=request.precision,
        attention=request.attention,
    )
    chunks = show_progress(itertools.chain([first], chunks), source)
    tally = write_predictions(request.predictions, chunks, model, findings, choice)
    flow = first.dataset.flow
    log_summary(tally, findings, model.trained, request.predictions, flow)
    training = training_patients(model.trained, request.checkpoint)
    report_labelled(tally, model.trained, first.dataset, request, training)
    if choice is not None:
        explain_patients(choice, model, request, training)
    return EXIT_DONE


def find_source(
    request: Namespace, config: dict[str, Any], datasets: Mapping[str, type[TrajectoryDataset]]
) -> Path:
    """Return the file or folder to read, which must be of the checkpoint's kind.

    Raises:
        InputError: naming the difference, or the flag that is missing.
    """
    trained = {"dataset": config["dataset"], **config["reading"]}
    dataset = datasets[config["dataset"]]
    for name in ("dataset", *(option for each in datasets.values() for option in each.options)):
        value = getattr(request, name, None)
        if value not in (None, trained.get(name)):
            made = trained.get(name, f"--dataset {config['dataset']}")
            raise InputError(f"--{name} {value}: the checkpoint was trained on {made}")
    sources = {each.source_flag for each in datasets.values()}
    if [name for name in sources if getattr(request, name) is not None] != [dataset.source_flag]:
        raise InputError(
            f"--predict: the checkpoint was trained on --dataset {config['dataset']}: give the "
            f"rows to score by --{dataset.source_flag} alone"
        )
    source: Path = getattr(request, dataset.source_flag)
    return source


def check_output(out: Path) -> None:
    """Check that predictions, and the pages beside them, replace earlier ones alone.

    Raises:
        InputError: naming the file or folder in the way.
    """
    if out.suffix != ".csv" or not out.absolute().parent.is_dir():
        raise InputError(f"--predictions {out}: give a .csv file in a folder that exists")
    own = {out: _beginning(out).startswith(HEADERS)}
    own |= {page: PAGE_MARK in _beginning(page) for page in (report_path(out), patients_path(out))}
    for path in own:
        if path.exists() and not own[path]:
            raise InputError(
                f"--predictions {out}: {path} was not written by --predict: choose another name"
            )


def _beginning(path: Path) -> str:
    """Return the first 2,000 characters of a text file; empty without a file."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(2000)


def report_path(predictions: Path) -> Path:
    """Return the path of the report on labelled predictions."""
    return predictions.with_suffix(".report.html")


def show_progress(chunks: Iterable[ScoringRows], source: Path) -> Iterator[ScoringRows]:
    """Yield chunks under a bar over the bytes of a file or the rows of a folder.

    Without a terminal there is a line a minute at most.
    """
    size = source.stat().st_size if source.is_file() else None
    unit = "B" if size else " rows"
    every = 0.1 if sys.stderr.isatty() else 60
    with tqdm(
        None, "predicting", size, leave=False, mininterval=every, unit=unit, unit_scale=True
    ) as bar:
        for rows in chunks:
            yield rows
            bar.update(rows.read - bar.n)


@dataclass
class PredictionTally:
    """Counts of scored rows; nothing is kept of rows without a label.

    Attributes:
        rows: of the input.
        scored: rows with a probability.
        positive: rows at or above the threshold.
        formulas: rows whose id a spreadsheet would run.
        labelled: labelled rows of each chunk: the columns of ``TrajectoryDataset.people``, and
            label, probability, and the hashes that training patients are known by: of the patient
            and of the row.
    """

    rows: int = 0
    scored: int = 0
    positive: int = 0
    formulas: int = 0
    labelled: list[pd.DataFrame] = field(default_factory=list)

    def add(self, lines: pd.DataFrame, rows: ScoringRows) -> None:
        """Count the lines that were written of some rows, all of ``rows.dataset`` with a score."""
        dataset = rows.dataset
        self.rows += len(lines)
        self.scored += len(rows.places)
        self.positive += int(lines["prediction"].sum())
        self.formulas += sum(map(is_formula, lines["id"]))
        labelled = np.flatnonzero(~np.isnan(dataset.labels))
        table = dataset.people().iloc[labelled].reset_index(drop=True)
        self.labelled.append(
            table.assign(
                label=dataset.labels[labelled],
                probability=lines["probability"].to_numpy()[rows.places[labelled]],
                patient=patient_hashes(dataset, labelled),
                row=row_hashes(dataset, labelled),
            )
        )

    def flow(self) -> pd.DataFrame:
        """Return how the rows came to those that are judged, see ``TrajectoryDataset.flow``."""
        labelled = sum(map(len, self.labelled))
        lines = [
            ("without a score", self.rows - self.scored, self.scored),
            ("without a label", self.scored - labelled, labelled),
        ]
        return pd.DataFrame(lines, columns=list(FLOW_COLUMNS))


def write_predictions(
    path: Path,
    chunks: Iterable[ScoringRows],
    model: TrajectoryModel,
    findings: Findings,
    choice: PatientChoice | None = None,
) -> PredictionTally:
    """Score rows chunk by chunk; the file appears when the last one is written.

    Args:
        path: of the file.
        chunks: of the input.
        model: scores.
        findings: of the input.
        choice: gets the rows of the page of patients; None where none is asked for.

    Raises:
        InputError: a row cannot be scored and the findings are strict, the input lacks an id that
            is asked for, or another run writes here.
    """
    tally = PredictionTally()
    with (
        locked(path),
        atomic(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        for rows in chunks:
            lines, scored = prediction_table(rows, model.trained, findings, model.batch_size)
            count_implausible(scored.dataset, findings)
            lines.to_csv(file, index=False, header=tally.rows == 0)
            tally.add(lines, scored)
            if choice is not None:
                choice.add(lines, scored)
        if choice is not None:
            choice.check_found(findings.source)
        for page in (report_path(path), patients_path(path)):
            remove(page)  # those of the predictions that are replaced
    return tally


def log_summary(
    tally: PredictionTally,
    findings: Findings,
    trained: TrainedModel,
    path: Path,
    flow: pd.DataFrame | None,
) -> None:
    """Log what was found in the input, how its rows came about, and what was written."""
    findings.log()
    for line in [] if flow is None else flow_lines(flow):
        logger.info(line)
    if "decision" not in trained.config:
        logger.warning(
            "the checkpoint has no threshold, since its run was not finished: %g is used",
            trained.rule.threshold,
        )
    if tally.formulas:
        logger.warning(
            f"{tally.formulas:,} ids begin like a formula: a spreadsheet would run them: import "
            "the column as text"
        )
    logger.info(
        f"{tally.rows:,} rows: {tally.scored:,} scored, {tally.positive:,} of them at or above the "
        f"threshold {trained.rule.threshold:g}; {tally.rows - tally.scored:,} without a score"
    )
    logger.info("predictions: %s; %s", path, peak_memory())


def report_labelled(
    tally: PredictionTally,
    trained: TrainedModel,
    dataset: TrajectoryDataset,
    request: Namespace,
    training: tuple[NDArray[np.int64], bool],
) -> None:
    """Write and print how good the predictions are, where labels of both classes are known.

    Args:
        tally: of the predictions.
        trained: the model.
        dataset: the first rows.
        request: of the command.
        training: as from ``training_patients``.
    """
    people = pd.concat(tally.labelled, ignore_index=True)
    labels, probability, groups, rows = (
        people.pop(name).to_numpy() for name in ("label", "probability", "patient", "row")
    )
    fewest = request.min_cell
    if len(np.unique(labels)) < 2:
        if len(labels):
            logger.info("labelled rows: %d, of one class only: no figures", len(labels))
        return
    config = trained.config
    known, named = training
    overlap = find_overlap(groups, rows, known, named=named and dataset.named, fewest=fewest)
    first = (overlap.sentence if overlap.flatters else "", weight_0_sentence(config))
    # No id is kept, so none can be named.
    cohort = Cohort(labels, probability, groups, groups, bands_of(people), baselines={})
    figures = cohort_figures(cohort, trained.rule.threshold, request.seed, fewest)
    content = ReportContent(
        title=f"{config['outcome']}: {STAGE_NAMES[config['stage']]} on the rows of "
        f"{Path(dataset.source).name}",
        outcome=config["outcome"],
        question=dataset.asked(),
        data={
            "Source": Path(dataset.source).name,
            "Judged": f"{len(labels):,} rows with a score and a label",
            "Training patients": overlap.sentence,
            "Missing values": "masked, never filled in",
        },
        flow=flow_table(tally.flow(), fewest),
        card=model_card(config, request),
        shift=shift_table(config["case_mix"], case_mix_of(people, labels, groups)),
        notice=random_model_notice(config),
        first=" ".join(filter(None, first)),
    )
    path = report_path(request.predictions)
    sentences = write_report(path, cohort, figures, content)
    lines = [f"{tile.name + ':':<20}{tile.figure}" for tile in headline(figures)]
    logger.info(
        "\nrows with a label: %s\n%s\n\n%s\nreport: %s",
        counts_text(figures.n, figures.events),
        "\n".join(lines),
        sentences,
        path,
    )


def training_patients(trained: TrainedModel, checkpoint: Path) -> tuple[NDArray[np.int64], bool]:
    """Return hashes of the patients that trained a model, and whether they have identifiers.

    Stage 1 alone holds them. Stages 2 and 3 have the same training part where their rows are those
    of the stage 1 in the folder of their run.

    Returns:
        No hashes where they are not known: of a shared model, or where stage 1 is missing, not the
        one of ``run.json``, or damaged.
    """
    if trained.train_patients is not None:
        return trained.train_patients, bool(trained.config["named"])
    place = checkpoint_path(checkpoint).absolute()
    beside = place.parent.parent / TRAJECTORY_FILE
    with contextlib.suppress(InputError, OSError):  # neither hinders a report
        if file_hash(beside) == (read_run(place.parent) or {}).get("stage_1_sha256"):
            stage1 = read_trajectory(beside)
            if stage1.config["rows_sha256"] == trained.config["rows_sha256"]:
                return stage1.train_patients, bool(stage1.config["named"])
    return np.empty(0, np.int64), False


def model_card(config: dict[str, Any], request: Namespace) -> dict[str, str]:
    """Return what a reader of figures on other rows must know of the model."""
    base = config.get("base_model")
    return {
        **CARD,
        "Limits": (
            "The model was not changed for these rows: threshold and recalibration are those of "
            "its own validation part."
        ),
        "Model": STAGE_TITLES[config["stage"]] + (f", {base}" if base else ""),
        "Checkpoint": request.checkpoint.absolute().name,  # a page is shared: no path
        "Intervals": INTERVALS,
        "Small cells": counting_rule(request.min_cell),
        "Seed": f"{request.seed}, of the intervals",
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "SHA-256 of its training data": config["data_sha256"],
        "SHA-256 of the code": code_hash(),
        "Commit": git_commit() or "not known",
    }
