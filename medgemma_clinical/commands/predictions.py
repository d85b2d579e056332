"""Write predictions of new rows, and evaluate the model where they have labels."""

from __future__ import annotations

import contextlib
import itertools
import logging
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.commands import pages, patients, prediction_files
from medgemma_clinical.commands.aggregate import write_aggregate
from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.run_folder import read_run
from medgemma_clinical.commands.update import write_update
from medgemma_clinical.data.distributions import ASKS_UNIT, last_values, row_medians
from medgemma_clinical.data.dka import description_path
from medgemma_clinical.data.findings import Findings, flow_lines
from medgemma_clinical.data.overlap import TrainingPatients, both_hashes, patient_hashes
from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.data.trajectories import FLOW_COLUMNS, ScoringRows, TrajectoryDataset
from medgemma_clinical.distributed import peak_memory, processes, show_progress
from medgemma_clinical.evaluation import decision
from medgemma_clinical.evaluation.demographics import demographics
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import MODEL, evaluate
from medgemma_clinical.evaluation.report import build_topics, write_report
from medgemma_clinical.evaluation.rules import describe_moves, stored
from medgemma_clinical.evaluation.target import (
    NO_RISKS,
    Target,
    read_weights,
    weighed,
    weighing_inputs,
)
from medgemma_clinical.evaluation.topics.all_topics import prediction_topics
from medgemma_clinical.evaluation.topics.calibration import calibration_updates
from medgemma_clinical.evaluation.topics.cohort import case_mix, case_mix_topic, cohort
from medgemma_clinical.evaluation.topics.topic import Evaluated, Page, TopicBuilder
from medgemma_clinical.evaluation.topics.written_reports import right_answers
from medgemma_clinical.evaluation.updating import evaluate_updates
from medgemma_clinical.files import InputError, atomic, file_hash, locked, move_aside
from medgemma_clinical.inference.hub import check_folder
from medgemma_clinical.inference.scoring import count_implausible, prediction_table, scoring_rows
from medgemma_clinical.inference.trajectory_model import MEMORY_ROWS, TrajectoryModel
from medgemma_clinical.models import checkpoints, trained_model
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, Config, read_trajectory
from medgemma_clinical.models.model_card import choosing_rows, weight_0_sentence
from medgemma_clinical.models.trained_model import TrainedModel

logger = logging.getLogger(__name__)


def predict(request: Namespace, kind: type[TrajectoryModel]) -> int:
    """Write a prediction for each row of the input; what is None is the checkpoint's to decide."""
    if processes().num_processes > 1:
        raise InputError("predict runs in one process: start it by python, not accelerate")
    config = trained_model.read_trained_config(request.checkpoint)
    if config["dataset"] not in kind.datasets:
        raise InputError(
            f"--checkpoint {request.checkpoint}: trained on --dataset {config['dataset']}, which "
            "this program does not have"
        )
    trained_model.check_no_control(request.checkpoint, config)
    source = find_source(request, config, kind.datasets)
    check_output(request, source)
    if request.update:
        check_folder(request.update, config)
    findings = Findings(str(source), strict=request.strict)
    reading: Config = {**config, "read_options": {**config["read_options"]}}
    if request.site is not None:
        reading["read_options"]["site"] = request.site
    max_rows = MEMORY_ROWS[config["stage"]]
    chunks = scoring_rows(source, reading, kind.datasets, findings, max_rows)
    first = next(chunks)  # faults of the input show before a language model is loaded
    model = load_model(request, kind)
    chunks = log_progress(itertools.chain([first], chunks), source)
    tally = write_predictions(request, chunks, model, findings)
    findings.log()
    if first.dataset.flow is not None:
        for line in flow_lines(first.dataset.flow):
            logger.info(line)
    tally.log(model)
    logger.info("predictions: %s; %s", request.predictions, peak_memory())
    training = training_patients(model.trained, request.checkpoint)
    rows = first.dataset.with_inputs(**config["inputs"])
    units = [line for line in findings.misfits if line.endswith(ASKS_UNIT)]
    labelled = report_labelled(tally, model, rows, request, training, units)
    if request.explain:
        patients.explain_rows(tally.chosen, model, request, training)
    trained, used = model.trained, tally.used
    if request.update:
        data_hash = file_hash(source)
        write_update(request.update, trained, used, labelled.rows, labelled.updates, data_hash)
    if request.aggregate:
        write_aggregate(request.aggregate, trained, labelled.rows, used, labelled.primary)
    return EXIT_DONE


def load_model(request: Namespace, kind: type[TrajectoryModel]) -> TrajectoryModel:
    """Load the model with the request's threshold; refuse what it cannot do."""
    model = kind.from_pretrained(
        request.checkpoint,
        batch_size=request.batch_size,
        model_name=request.model_name,
        text_model=request.text_model,
        quantization=request.quantization,
        precision=request.precision,
        attention=request.attention,
    )
    if request.threshold is not None:
        model.trained = with_threshold(model.trained, request.threshold, request.checkpoint)
    used = model.trained.model_named(request.use)
    baselines = model.trained.baselines.names if model.trained.baselines else []
    if request.primary and request.primary not in baselines:
        choices = ", ".join(baselines) or "none: this copy of the model has no baselines"
        raise InputError(f"--primary {request.primary}: choose from {choices}")
    if request.explain and used != model.trained.name:
        raise InputError(f"--explain shows the risk of the stage itself: leave --use {used} out")
    return model


def find_source(
    request: Namespace, config: Config, datasets: Mapping[str, type[TrajectoryDataset]]
) -> Path:
    """Return the file or folder to read; refuse flags of another kind than the checkpoint's."""
    trained = {"dataset": config["dataset"], **config["read_options"]}
    dataset = datasets[config["dataset"]]
    options = [option for kind in datasets.values() for option in kind.options]
    for name in ("dataset", *options):
        value = getattr(request, name, None)
        is_new_site = name == "site" and name in dataset.options
        if value not in (None, trained.get(name)) and not is_new_site:
            made = trained.get(name, f"--dataset {config['dataset']}")
            raise InputError(f"--{name} {value}: the checkpoint was trained on {made}")
    sources = {kind.source_flag for kind in datasets.values()}
    if [name for name in sources if getattr(request, name) is not None] != [dataset.source_flag]:
        raise InputError(
            f"predict: the checkpoint was trained on --dataset {config['dataset']}: give the "
            f"rows to score by --{dataset.source_flag} alone"
        )
    source: Path = getattr(request, dataset.source_flag)
    return source


def with_threshold(trained: TrainedModel, choice: str, checkpoint: Path) -> TrainedModel:
    """Return a model whose rules have another threshold: a goal is reached on held-out rows.

    These are the rows that chose the threshold in training, whose risks the run folder holds.
    """
    goal, value = decision.parse_threshold(choice)
    targets, table = trained.outcome.targets, pd.DataFrame()
    if goal:
        table = held_out_risks(trained, checkpoint, choice)
        targets = read_weights(targets, table)
    rules: dict[str, decision.Rules] = {}
    for name, own in trained.rules.items():
        chosen = dict.fromkeys(own, value)
        if goal:
            for target in targets:
                risk = table[target.column(name)].to_numpy(float)
                known = target.known(table)
                chosen[target.name] = decision.choose_threshold(choice, known, risk)
        rules[name] = {k: replace(rule, threshold=chosen[k]) for k, rule in own.items()}
    models = stored(rules)
    config: Config = {**trained.config, "threshold_choice": choice}
    config["decision"], config["models"] = models.pop(trained.name), models
    return replace(trained, config=config)


def held_out_risks(trained: TrainedModel, checkpoint: Path, choice: str) -> pd.DataFrame:
    """Read labels and risks of the rows that chose a model's threshold from its run folder."""
    path = trained_model.checkpoint_path(checkpoint).absolute()
    is_stage_1 = trained.config["stage"] == "trajectory"
    stage = checkpoints.folder_of_stage_1(path) if is_stage_1 else path.parent
    file = prediction_files.VAL
    if of_folds(trained.config):
        of_sites = stage.with_name(f"leave_out_{stage.name}")
        of_patients = stage.with_name(f"folds_{stage.name}")
        stage, file = of_sites if of_sites.is_dir() else of_patients, prediction_files.FOLDS
    try:
        return prediction_files.read_predictions(stage, trained.name, trained.outcome.targets, file)
    except InputError as error:
        raise InputError(f"--threshold '{choice}': {error}, or give a risk") from error


def outputs(predictions: Path) -> list[Path]:
    """Return the tables to write: predictions and inputs."""
    return [predictions, inputs_path(predictions)]


def inputs_path(predictions: Path) -> Path:
    """Return the path of the last values beside a file of predictions."""
    return predictions.with_suffix(".inputs.csv")


def input_lines(rows: ScoringRows, config: Config) -> pd.DataFrame:
    """Return id, last known value of each input of the model, and whether it was measured."""
    last = last_values(rows.dataset.with_inputs(**config["inputs"])).droplevel(0, axis=1)
    last = last.set_axis(rows.positions, axis=0).reindex(range(len(rows.ids)))
    measured = last.notna().astype(int).add_suffix(" measured")
    columns = [column for name in last for column in (name, f"{name} measured")]
    lines = last.join(measured)[columns]
    lines.insert(0, "id", rows.ids)
    return lines


def check_output(request: Namespace, source: Path) -> None:
    """Check that predictions can be written, and not over the rows or as their description."""
    inputs = {path.resolve() for path in (source, description_path(source))}
    for flag in ("predictions", "aggregate"):
        if (out := getattr(request, flag)) is None:
            continue
        if not out.absolute().parent.is_dir() or out.is_dir():
            raise InputError(f"--{flag} {out}: name a file in a folder that exists")
        written = [out, inputs_path(out)] if flag == "predictions" else [out]
        if any(x.resolve() in inputs for x in written):
            problem = "is the name of the rows to score, or of their description: choose another"
            raise InputError(f"--{flag} {out}: {problem}")
        if flag != "predictions" and out.absolute() == request.predictions.absolute():
            raise InputError(f"--{flag} {out}: is the file of --predictions")


def report_path(predictions: Path) -> Path:
    """Return the path of the report on labelled predictions."""
    return predictions.with_suffix(".report.html")


def log_progress(chunks: Iterable[ScoringRows], source: Path) -> Iterator[ScoringRows]:
    """Yield chunks under a bar of the bytes that were read, of a folder without."""
    if not source.is_file():
        yield from chunks
        return
    with show_progress((), "predicting", source.stat().st_size) as bar:
        for rows in chunks:
            yield rows
            bar.update(rows.read - bar.n)


@dataclass
class PredictionTally:
    """Counts of scored rows; nothing is kept of rows without a label, the chosen ones apart."""

    used: str  # the model
    columns: dict[str, str]  # of the predictions, by those of a table of risks
    targets: tuple[Target, ...]
    rules: decision.Rules  # of the used one
    rows: int = 0
    scored: int = 0
    positive: int | None = None  # None where nothing is predicted but a risk
    labelled: list[pd.DataFrame] = field(default_factory=list)  # of each chunk, see ``add``
    medians: list[pd.DataFrame] = field(default_factory=list)  # of the same rows
    inputs: list[Array] = field(default_factory=list)  # on which the end of follow-up may depend
    chosen: list[patients.ChosenRow] = field(default_factory=list)  # of the page of patients

    @property
    def threshold(self) -> float:
        """The first risk from which on the event is predicted."""
        return self.rules[self.targets[0].name].threshold

    def add(self, lines: pd.DataFrame, rows: ScoringRows) -> None:
        """Count the output lines; keep risks by model and hashes of the labelled rows."""
        self.rows += len(lines)
        self.scored += len(rows.positions)
        if "prediction" in lines:
            self.positive = (self.positive or 0) + int(lines["prediction"].sum())
        dataset = rows.dataset
        labelled = np.flatnonzero(~np.isnan(dataset.labels))
        if not len(labelled):
            return
        self.medians.append(row_medians(dataset).iloc[labelled])
        if any(target.horizon for target in self.targets):
            self.inputs.append(weighing_inputs(dataset, labelled))
        about = demographics(dataset).iloc[labelled].reset_index(drop=True)
        happened = dataset.observed(labelled).drop(columns=[*about], errors="ignore")
        risks = lines.iloc[rows.positions[labelled]][[*self.columns.values()]]
        risks = risks.set_axis([*self.columns], axis=1).reset_index(drop=True).astype(float)
        kept = about.join(happened).join(risks)
        kept["patient"] = patient_hashes(dataset, labelled)
        kept["rows"] = list(both_hashes(dataset, labelled))
        self.labelled.append(kept)

    def flow(self, overlap: Overlap) -> pd.DataFrame:
        """Return how many rows lack a score or a label, or are in the training data."""
        labelled, new = len(overlap.is_new), int(overlap.is_new.sum())
        steps = [
            ("without a score", self.rows - self.scored, self.scored),
            ("without a label", self.scored - labelled, labelled),
            ("in the training data", labelled - new, new),
        ]
        return pd.DataFrame(steps, columns=list(FLOW_COLUMNS[:3]))

    def log(self, model: TrajectoryModel) -> None:
        """Log the counts, and what a user should know of the output."""
        if "decision" not in model.config:
            text = "the checkpoint has no threshold, since its run was not finished: %g is used"
            logger.warning(text, self.threshold)
        above = ""
        if self.positive is not None:
            above = f", {self.positive:,} of them at or above the threshold {self.threshold:g}"
        without = f"{self.rows - self.scored:,} without a score"
        logger.info(f"{self.rows:,} rows: {self.scored:,} scored{above}; {without}")


def write_predictions(
    request: Namespace, chunks: Iterable[ScoringRows], model: TrajectoryModel, findings: Findings
) -> PredictionTally:
    """Score rows chunk by chunk; the file appears at the end, earlier ones move aside."""
    trained, path = model.trained, request.predictions
    used, targets = trained.model_named(request.use), trained.outcome.targets
    tally = PredictionTally(used, trained.columns(used), targets, trained.rules[used])
    now, of_model = datetime.now(UTC).isoformat(timespec="seconds"), {MODEL: trained.sha256}
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(path))
        files = [
            stack.enter_context(whole.open("w", encoding="utf-8", newline=""))
            for whole in [stack.enter_context(atomic(out)) for out in outputs(path)]
        ]
        for rows in chunks:
            lines, scores = prediction_table(rows, trained, findings, model.batch_size, used)
            count_implausible(scores.rows.dataset, findings)
            lines = as_written(lines, tally.threshold)
            written = lines.assign(predicted_at=now, **of_model), input_lines(rows, trained.config)
            for table, file in zip(written, files, strict=True):
                table.to_csv(file, index=False, header=tally.rows == 0)
            tally.add(lines, scores.rows)
            if request.explain:
                tally.chosen = patients.choose_rows(
                    tally.chosen, lines, scores.rows, request.patients
                )
        for aside in move_aside([*outputs(path), report_path(path), patients.patients_path(path)]):
            logger.info("earlier file moved to %s", aside)
    return tally


def as_written(lines: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return predictions with the digits of their file, and the decisions on these risks."""
    # A model of 32 bits has no more than six digits.
    risks = lines.select_dtypes("float").map(lambda risk: float(f"{risk:.6g}"))
    positive = risks["probability"].to_numpy() >= threshold
    decided = pd.Series(positive, lines.index, dtype="Int64")
    return lines.assign(**risks, prediction=decided.where(risks["probability"].notna()))


class Labelled(NamedTuple):
    """Labelled rows that are not in the training data, the planned baseline, and updates."""

    rows: pd.DataFrame
    primary: str | None = None
    updates: Any = None


def report_labelled(
    tally: PredictionTally,
    model: TrajectoryModel,
    dataset: TrajectoryDataset,
    request: Namespace,
    training: TrainingPatients,
    units: Sequence[str],  # series that look as in another unit
) -> Labelled:
    """Evaluate labelled rows that are not in the training data; return them."""
    if not tally.labelled:
        return Labelled(pd.DataFrame())
    labelled = pd.concat(tally.labelled, ignore_index=True)
    overlap = find_overlap(labelled, dataset, model.config, training)
    new = labelled[overlap.is_new].reset_index(drop=True)
    note = overlap.sentence(0)
    if problem := tally.targets[0].problem(new):
        logger.info("%s No metrics: %s.", note, problem)
        return Labelled(new)
    evaluated = evaluate_labelled(tally, new, overlap, request)
    updates = evaluate_updates(evaluated.rows, tally.used, evaluated.targets, request.seed)
    first = ""
    if model.stage == "generative" and tally.used == model.trained.name:
        first = right_answers(
            evaluated.rows, tally.used, evaluated.threshold, request.seed, request.min_cell
        )
    checkpoint = request.checkpoint.absolute().name  # a page is shared: no path
    path = report_path(request.predictions)
    page = cohort_page(evaluated, tally, dataset, overlap, updates, first, checkpoint, units)
    write_report(path, page)
    lines = [first, weight_0_sentence(model.config), *map(str, pages.sentences(evaluated))]
    text = "\n".join(filter(None, lines))
    logger.info("\n%s\n%s\nreport: %s", text, note, path)
    return Labelled(new, evaluated.metrics.primary, updates)


def evaluate_labelled(
    tally: PredictionTally,
    new: pd.DataFrame,  # labelled rows that are not in the training data
    overlap: Overlap,
    request: Namespace,
) -> Evaluated:
    """Evaluate the models on new labelled rows."""
    names = new["patient"].astype(str)
    happened = new[[name for name in NO_RISKS if name in new]]
    risks = new[[*tally.columns]].dropna(axis=1)  # NaN of a baseline that lacks a column
    rows = happened.assign(id=names, patient=names).join(risks)

    def inputs() -> Array:
        return np.concatenate(tally.inputs)[overlap.is_new]

    targets = weighed(tally.targets, rows, inputs, request.censoring, request.seed)
    config = overlap.config
    trained = config.get("metrics", {})
    planned = (trained.get("test") or trained.get("folds") or {}).get("primary")
    thresholds = [rule.threshold for rule in tally.rules.values()]
    metrics = evaluate(
        rows,
        request.seed,
        thresholds,
        reference=tally.used,
        primary=request.primary or planned,
        targets=targets,
    )
    choice = decision.describe_threshold(config.get("threshold_choice"), choosing_rows(config))
    return Evaluated(
        rows,
        metrics,
        new,
        request.seed,
        thresholds,
        choice,
        overlap.noun,
        request.min_cell,
        targets=targets,
    )


def cohort_page(
    evaluated: Evaluated,
    tally: PredictionTally,
    dataset: TrajectoryDataset,
    overlap: Overlap,
    updates: Any,
    first: str,  # the sentence before the findings
    checkpoint: str,
    units: Sequence[str],
) -> Page:
    """Return the page of an external cohort."""
    config, source = overlap.config, Path(dataset.source).name
    changes = describe_moves(tally.rules, tally.targets)
    recalibration = f"The risks were recalibrated on {choosing_rows(config)}: {changes}."
    results: list[TopicBuilder] = [
        *prediction_topics(evaluated.targets, recalibration=recalibration if changes else ""),
        partial(calibration_updates, tried=updates),
    ]
    medians = pd.concat(tally.medians)[overlap.is_new]
    mix = case_mix(evaluated.patients, medians, evaluated.min_cell)
    data = {
        "Source": source,
        "Scored": f"{len(evaluated.rows):,} {overlap.noun} with a score and a label",
        "Missing values": "masked, never filled in",
    }
    builders: list[TopicBuilder] = [
        *([] if evaluated.has_few else results),
        partial(case_mix_topic, development=config["case_mix"], here=mix),
        partial(cohort, data=data, flow=tally.flow(overlap)),
    ]
    moved = "; an earlier update moved it." if config.get("updated") else "."
    return pages.model_page(
        f"{config['outcome']}: {tally.used} on the {overlap.noun} of {source}",
        evaluated,
        build_topics(evaluated, builders),
        config,
        question=dataset.task_description(),
        findings=pages.result_words(evaluated),
        card={
            "Limits": f"The model was not changed for these rows{moved}",
            "Checkpoint": checkpoint,
            "Seed": f"{evaluated.seed}, of the intervals",
        },
        first=first,
        last=overlap.sentence(evaluated.min_cell),
        notices=units,
    )


class Overlap(NamedTuple):
    """Which of the labelled rows are in the training data of a model."""

    is_new: NDArray[np.bool_]  # (n,)
    noun: str  # what the rows are
    config: Config
    training: TrainingPatients

    def sentence(self, min_cell: int) -> str:
        """Return the counts in words, and whether the metrics may be optimistic."""
        complete = self.config.get("updated", {}).get("complete", True)
        if not len(self.training.hashes) or not complete:
            return (
                f"The checkpoint does not hold its training data: if these {self.noun} are in "
                "them, the metrics are optimistic."
            )
        old = int((~self.is_new).sum())
        count = count_text(old, min_cell)
        which = f"{count.capitalize()} {self.noun} are"
        if not min_cell:  # beside the patients that were tested, the total tells a small count
            which = f"Of {len(self.is_new):,} {self.noun} {count} are"
        text = f"{which} in the training data and left out of the metrics."
        if not old or of_folds(self.config):
            return text
        return (
            f"{text} Others of these data may have chosen the epochs and taught the baselines: the "
            "metrics may be optimistic."
        )


def find_overlap(
    labelled: pd.DataFrame, dataset: TrajectoryDataset, config: Config, training: TrainingPatients
) -> Overlap:
    """Return which labelled rows are in the training data."""
    names, rows = labelled["patient"], np.stack(labelled["rows"].tolist())
    is_old = training.include(names.to_numpy(), rows, has_ids=dataset.has_patient_ids)
    noun = "patients" if names.is_unique else dataset.row_noun
    return Overlap(~is_old, noun, config, training)


def of_folds(config: Config) -> bool:
    """Return whether a model was trained on all patients, after folds."""
    return "folds" in config.get("metrics", {})


def training_patients(trained: trained_model.TrainedModel, checkpoint: Path) -> TrainingPatients:
    """Return what is known of a model's training patients."""
    hashes, config = trained.train_patients, trained.config
    if hashes is None:
        # Stages 2 and 3 store none, but share the training part of the stage 1 in their run.
        folder = trained_model.checkpoint_path(checkpoint).absolute().parent
        beside = folder.parent / TRAJECTORY_FILE
        with contextlib.suppress(InputError, OSError):  # neither hinders a report
            if file_hash(beside) == (read_run(folder) or {}).get("stage_1_sha256"):
                stage1 = read_trajectory(beside)
                if stage1.config["rows_sha256"] == config["rows_sha256"]:
                    hashes, config = stage1.train_patients, stage1.config
    if hashes is None:
        return TrainingPatients(np.empty(0, np.int64), has_ids=False)
    return TrainingPatients(hashes, bool(config["has_patient_ids"]))
