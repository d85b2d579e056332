"""What a report says beside its metrics: one builder for runs, folds and external cohorts."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.sample_size import describe_sample_size
from medgemma_clinical.data.texts import code
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.demographics import demographic_bands, demographics
from medgemma_clinical.evaluation.topics.cohort import part_table, table_one
from medgemma_clinical.evaluation.topics.topic import ReportContent
from medgemma_clinical.models import model_card
from medgemma_clinical.models.checkpoints import Config
from medgemma_clinical.models.outcome import outcome_of
from medgemma_clinical.training.stage import Stage


def report_content(
    title: str,
    dataset: TrajectoryDataset,
    config: Config,
    patients: pd.DataFrame,  # ``demographics`` of the evaluated rows
    args: Namespace,
    *,
    card: Mapping[str, str],  # first lines on the model
    last: Iterable[str] = (),
    **parts: Any,  # other fields of ``ReportContent``
) -> ReportContent:
    """Return what a page says beside its metrics, small counts of the configuration hidden."""
    shared = model_card.shareable(config, args.min_cell)
    card = model_card.page_card(shared, card)
    recommended = card.pop(model_card.RECOMMENDED, "")
    return ReportContent(
        title=title,
        question=dataset.task_description(),
        card=card,
        seed=args.seed,
        bands=demographic_bands(patients),
        sites=None if dataset.sites is None else patients["site"].to_numpy(str),
        notice=model_card.built_in_notice(config),
        first=[*filter(None, [model_card.weight_0_sentence(shared)])],
        last=[*([f"{model_card.RECOMMENDED}: {recommended}."] if recommended else []), *last],
        describe=outcome_of(config).sentences,
        has_tripod=outcome_of(config).has_tripod,
        **{"noun": dataset.noun, **parts},
    )


def training_content(
    title: str,
    dataset: TrajectoryDataset,
    config: Config,
    rows: NDArray[np.int64],  # positions that are evaluated
    split: Mapping[str, NDArray[np.int64]],
    args: Namespace,
    **parts: Any,
) -> ReportContent:
    """Return ``report_content`` of data that the model was trained on: these are described."""
    return report_content(
        f"{title}: {dataset.outcome}",
        dataset,
        config,
        demographics(dataset).iloc[rows],
        args,
        data={
            "Source": Path(dataset.source).name,
            "Kind": dataset.kind,
            "Used": f"{len(dataset):,} {dataset.noun}",
            "Missing values": "masked, never filled in",
            "Static features": ", ".join(config["inputs"]["static"]) or "none are read",
        },
        flow=dataset.flow,
        split=part_table(dataset.labels, dataset.groups, split, dataset.event_kinds),
        table_one=table_one(dataset, {} if parts.get("folds") else split),
        **parts,
    )


def training_methods(stage: Stage, data: Data, run: dict[str, Any]) -> dict[str, str]:
    """Return what ``tripod.md`` says of data and training, in sentences."""
    dataset, arguments = data.dataset, run["arguments"]
    rates = [f"{stage.learning_rates[part]:g} ({part})" for part in stage.learning_parts]
    origin = dataset.describe_origin(arguments["seed"])
    size = describe_sample_size(dataset, data.usable_static, data.split["train"])
    names = ["members", "dynamics", "solver", "dropout"]
    names += [] if stage.text is None else ["lora_rank", "lora_alpha", "num_prefix_tokens"]
    encoder = stage.config["encoder"] or {}  # of a stage 1 that was trained before, too
    settings = {**arguments, "members": stage.config["members"], **encoder}
    texts = [f"{name} {settings[name]}" for name in names]
    kept = dataset.read_options.get("max_len")
    platt = "Platt's method on the validation part; all results are those after it."
    return {
        "preparation": f"Rows keep their latest {kept} observations." if kept else "",
        "split": f"Each patient is in one of three parts ({origin}): the training part fits the "
        "weights, the validation part chooses epochs and threshold and also teaches the baselines "
        "once their settings are chosen, the test part was scored once.",
        "unusable": "; ".join(f"{code(k)} ({why})" for k, why in data.unusable),
        "training": f"At most {stage.epochs} epochs, stopped after {stage.patience} without a "
        f"lower validation loss; steps of {run['rows_a_step'] * run['processes']} rows; AdamW with "
        f"learning rates {', '.join(rates)}; {', '.join(texts)}. "
        "The program tunes none of these; run.json has every setting.",
        "recalibration": platt if arguments["calibrate"] == "platt" else "None.",
        # It tells the number of events.
        **({} if arguments["min_cell"] else {"sample_size": size}),
    }
