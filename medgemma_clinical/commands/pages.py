"""The pages of runs, folds and external cohorts: what they share beside the topics of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.checks import describe_sample_size
from medgemma_clinical.data.texts import code
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation import report, verdicts
from medgemma_clinical.evaluation.metrics_table import Metrics
from medgemma_clinical.evaluation.report import build_topics, write_report
from medgemma_clinical.evaluation.topics import cohort, written_reports
from medgemma_clinical.evaluation.topics.topic import Evaluated, Page, Topic, TopicBuilder
from medgemma_clinical.evaluation.verdicts import Finding
from medgemma_clinical.models import model_card
from medgemma_clinical.models.checkpoints import Config
from medgemma_clinical.training.stage import Stage

EXAMPLE = "The data of one patient stand here: share this page only if they are open."

MIN_EVENTS = 30
"""Patients with, and without, the event in a test part below which a run names ``--folds``."""


def model_page(
    title: str,
    evaluated: Evaluated,
    topics: Sequence[Topic],
    config: Config,
    *,
    question: Mapping[str, str],
    findings: Sequence[Finding],
    card: Mapping[str, str],  # first lines on the model
    first: str,  # the sentence before the findings
    last: str,
    notices: Sequence[str] = (),
) -> Page:
    """Return the page of a model on some rows, small counts of the configuration hidden."""
    shared = model_card.shareable(config, evaluated.min_cell)
    lines = model_card.page_card(shared, card)
    before = [first, model_card.weight_0_sentence(shared)]
    behind = [last]
    if recommended := lines.pop(model_card.RECOMMENDED, ""):
        behind.insert(0, f"{model_card.RECOMMENDED}: {recommended}.")
    about = Topic("", terms=question, note="Square brackets hold 95\xa0% intervals.")
    return Page(
        title,
        [*as_findings(before), *findings, *as_findings(behind)],
        [about, *topics],
        report.report_card(evaluated, lines),
        [*filter(None, [model_card.built_in_notice(config), *notices])],
    )


def as_findings(sentences: Sequence[str]) -> list[Finding]:
    """Return sentences, but for empty ones, as lines of the box of findings."""
    return [Finding(None, sentence) for sentence in sentences if sentence]


def result_words(evaluated: Evaluated, advice: str = "") -> list[Finding]:
    """Return the result on some rows in words; ``advice`` is what helps where events are few."""
    if evaluated.has_few:
        return [Finding(None, report.FEW.format(evaluated.min_cell))]
    return sentences(evaluated, advice)


def sentences(evaluated: Evaluated, advice: str = "") -> list[Finding]:
    """Return the metrics of some rows in words."""
    words = evaluated.at_threshold, evaluated.noun, advice
    return verdicts.sentences(evaluated.metrics, *words, targets=evaluated.targets)


def few_events_advice(test: Metrics) -> str:
    """Return the way out where the test part has few events, in words."""
    if test.counts["minority_patients"] >= MIN_EVENTS:
        return ""
    return "These are few events: --folds 5 tests every patient once."


def data_terms(dataset: TrajectoryDataset, config: Config) -> dict[str, str]:
    """Return what a page says of the data that a model was trained on."""
    return {
        "Source": Path(dataset.source).name,
        **({"Kind": dataset.kind} if dataset.kind else {}),
        "Used": f"{len(dataset):,} {dataset.noun}",
        "Missing values": "masked, never filled in",
        "Static features": ", ".join(config["inputs"]["static"]) or "none are read",
    }


@dataclass(frozen=True)
class TrainingReport:
    """The report on held-out rows of the data that a model was trained on."""

    title: str
    evaluated: Evaluated
    dataset: TrajectoryDataset
    config: Config
    results: Sequence[TopicBuilder]  # on the risks
    split: Mapping[str, NDArray[np.int64]]
    card: Mapping[str, str]
    methods: Mapping[str, str]  # what ``tripod.md`` says of the training
    history: Sequence[Mapping[str, Any]] = ()
    example: Mapping[str, Any] | None = None  # prompt, text and target of a row
    is_stage1_again: bool = False  # a language model of weight 0: the results are stage 1's
    stage1_page: str = ""  # its page, empty if unknown
    last: str = ""  # a sentence behind the findings
    list_patients: bool = False  # names the rows with the largest errors

    def write(self, folder: Path) -> None:
        """Write ``report.html`` with its figures, and ``tripod.md``."""
        page = self.page()
        tripod = report.fill_tripod(
            page,
            self.evaluated,
            question=self.dataset.task_description(),
            data=data_terms(self.dataset, self.config),
            methods=self.methods,
            has_sites=self.dataset.sites is not None,
        )
        write_report(folder / "report.html", page, folder=folder, tripod=tripod)

    def page(self) -> Page:
        """Return the page."""
        findings, results = self.result()
        notices = [report.PATIENTS_NOTICE] if self.list_patients else []
        reports = self.config["metrics"].get("reports")
        topics = build_topics(
            self.evaluated, [partial(written_reports.written_reports, reports=reports)]
        )
        if self.example and not self.evaluated.min_cell:
            topics.append(written_reports.example_topic(self.example))
            notices.append(EXAMPLE)
        shown_reports = written_reports.suppress_reports(reports or {}, self.evaluated.min_cell)
        return model_page(
            f"{self.title}: {self.dataset.outcome}",
            self.evaluated,
            topics + results + build_topics(self.evaluated, self.cohort_topics()),
            self.config,
            question=self.dataset.task_description(),
            findings=findings,
            card=self.card,
            first=written_reports.written_sentence(shown_reports),
            last=self.last,
            notices=notices,
        )

    def result(self) -> tuple[list[Finding], list[Topic]]:
        """Return the result in words and topics; that of stage 1 is folded."""
        advice = "" if self.evaluated.folds else few_events_advice(self.evaluated.exact)
        findings = result_words(self.evaluated, advice)
        topics = build_topics(self.evaluated, [] if self.evaluated.has_few else self.results)
        if not self.is_stage1_again:
            return findings, topics
        link = Finding(None, "See the report of stage 1.", self.stage1_page)
        return [link], report.folded(findings, topics, "The results of stage 1, again")

    def cohort_topics(self) -> list[TopicBuilder]:
        """Return the builders of the topics on the data."""
        dataset = self.dataset
        parts = cohort.part_table(dataset.labels, dataset.groups, self.split, dataset.event_kinds)
        groups = {} if self.evaluated.folds else self.split
        data = data_terms(dataset, self.config)
        return [
            *([cohort.largest_errors] if self.list_patients else []),
            partial(cohort.table_one_topic, exact=cohort.table_one(dataset, groups), split=parts),
            partial(cohort.cohort, data=data, flow=dataset.flow, split=parts, history=self.history),
        ]


def training_methods(stage: Stage, data: Data, run: dict[str, Any]) -> dict[str, str]:
    """Return what ``tripod.md`` says of data and training, in sentences."""
    dataset, arguments = data.dataset, run["arguments"]
    seed = arguments["seed"]
    rates = [f"{stage.learning_rates[part]:g} ({part})" for part in stage.learning_parts]
    names = ["members", "dynamics", "solver", "dropout"]
    if stage.text is not None:
        names += ["lora_rank", "lora_alpha", "num_prefix_tokens"]
    encoder = stage.config["encoder"] or {}  # of a stage 1 that was trained before, too
    settings = {**arguments, "members": stage.config["members"], **encoder}
    texts = [f"{name} {settings[name]}" for name in names]
    kept = dataset.read_options.get("max_len")
    methods = {
        "preparation": f"Rows keep their latest {kept} observations." if kept else "",
        "split": f"Each patient is in one of three parts ({dataset.describe_origin(seed)}): the "
        "training part fits the "
        "weights, the validation part chooses epochs and threshold and also teaches the baselines "
        "once their settings are chosen, the test part was scored once.",
        "unusable": "; ".join(f"{code(k)} ({why})" for k, why in data.unusable),
        "training": f"At most {stage.epochs} epochs, stopped after {stage.patience} without a "
        f"lower validation loss; steps of {run['rows_a_step'] * run['processes']} rows; AdamW with "
        f"learning rates {', '.join(rates)}; {', '.join(texts)}. "
        "The program tunes none of these; run.json has every setting.",
        "recalibration": "None.",
    }
    if arguments["calibrate"] == "platt":
        methods["recalibration"] = (
            "Platt's method on the validation part; all results are those after it."
        )
    if not arguments["min_cell"]:  # it tells the number of events
        methods["sample_size"] = describe_sample_size(
            dataset, data.usable_static, data.split["train"]
        )
    return methods
