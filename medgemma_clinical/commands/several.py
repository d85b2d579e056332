"""Variants and seeds: runs of one command, compared: ``--ablation``, ``--seeds``."""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from medgemma_clinical.commands import compare, plan, prediction_files, run_folder
from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.logs import quiet_console
from medgemma_clinical.commands.results import baseline_names
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import processes
from medgemma_clinical.evaluation import baselines
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES
from medgemma_clinical.evaluation.metrics_table import evaluate, evaluate_splits
from medgemma_clinical.evaluation.target import read_weights, weight_columns
from medgemma_clinical.evaluation.verdicts import value_text
from medgemma_clinical.files import InputError, read_json, write_text
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE

logger = logging.getLogger(__name__)

SEED = "{seed}"
"""Stands in a flag's value for the number of the seed."""

ADDS = "What each part of the model adds"

STAGE_1_VARIANT, WORDS, FROZEN = "stage 1", "stage 1 + words", "stage 1 + frozen text"
ALONE = {"trajectory_only": True}
ON_STAGE_1 = {"ode_checkpoint": TRAJECTORY_FILE}
SOFT_PROMPT = {**ON_STAGE_1, "series_text": "none", "stage1_logit": "off"}
RANDOM = {"base_weights": "random", "quantization": "none"}  # packed weights cannot be drawn

VARIANTS: dict[str, dict[str, Any]] = {
    STAGE_1_VARIANT: ALONE,
    "stage 1 without facts": {**ALONE, "facts": "off"},
    WORDS: {**ALONE, "text_features": "words"},
    FROZEN: {**ALONE, "text_features": "frozen"},
    "states decay": {**ALONE, "dynamics": "decay"},
    "states held": {**ALONE, "dynamics": "none"},
    "facts as text": {"soft_prompt": "off", "series_text": "none"},
    "text": {"soft_prompt": "off"},
    "text + logit": {**ON_STAGE_1, "soft_prompt": "off"},
    "soft prompt": SOFT_PROMPT,
    "soft prompt + logit": {**ON_STAGE_1, "series_text": "none"},
    "text + soft prompt + logit": ON_STAGE_1,
    "soft prompt of another patient": {**SOFT_PROMPT, "soft_prompt": "shuffled"},
    "soft prompt + random weights": {**SOFT_PROMPT, **RANDOM},
}
"""Flags of the compared models; without ``trajectory_only`` a model of stage 2. A path lies below
the output folder."""

ON_TOP = (WORDS, FROZEN, "text + logit", "soft prompt + logit", "text + soft prompt + logit")
"""Variants with text on top of stage 1, of which the ensemble with the blend and the
regression with text are shown, too."""

COMPARED = [*VARIANTS, *compare.beside_runs(ON_TOP)]

VARIANTS_ARE = {
    STAGE_1_VARIANT: "reads series and static features; no language model",
    "stage 1 without facts": "reads the series alone",
    WORDS: "stage 1, to which what a regression on the words of the context says is added",
    FROZEN: "stage 1, to which what a regression on a language encoder's states says is added",
    "states decay": "stage 1 whose state decays between two observations, without the ODE",
    "states held": "stage 1 whose state stays the same between two observations, without the ODE",
    "facts as text": "a language model that reads the context of a patient, and no series",
    "text": "a language model that reads context and series as text",
    "text + logit": "the variant text, whose answer is added to that of stage 1",
    "soft prompt": "a language model that reads the context, and the series as soft tokens",
    "soft prompt + logit": "the variant soft prompt, whose answer is added to that of stage 1",
    "text + soft prompt + logit": "a language model that reads the series as text and as soft "
    "tokens, whose answer is added to that of stage 1",
    "soft prompt of another patient": "a control: the soft tokens are another patient's, so that "
    "only the context can help",
    "soft prompt + random weights": "a control: a language model that has learned no language",
}


class Compared(NamedTuple):
    """How the runs of a command are compared."""

    outcome: str
    reference: str  # the variant, or the baseline, with which variants are compared
    seed: int
    primary: str | None
    notice: str


def compared_by(args: Namespace, outcome: str) -> Compared:
    """Return how the flags of a command compare its runs."""
    reference = args.ablation[0] if args.ablation else STAGE_1_VARIANT
    notice = compare.built_in_models_notice({"all": vars(args)})
    return Compared(outcome, reference, args.seed, args.primary, notice)


# --------------------------------------------------------------------------- --ablation


def run_ablation(args: Namespace, dataset: TrajectoryDataset, train: plan.Train) -> int:
    """Train the unfinished variants on one split and compare them; return the exit code."""
    check_variants(args, dataset)
    runs = plan_variants(args, dataset)
    code = plan.carry_out([*runs.values()], train)
    if code == EXIT_DONE and processes().is_main_process:
        compare_variants(runs, args.output_dir / "ablation", compared_by(args, dataset.outcome))
    return code


def check_variants(args: Namespace, dataset: TrajectoryDataset) -> None:
    """Refuse unknown names; the first one, the reference, may be a baseline."""
    names, known = args.ablation, {*VARIANTS}
    if not {*names[:1]} <= known:  # costs a look at the data
        known |= {*baseline_names(run_folder.run_data(args, dataset, None)), ENSEMBLE}
    wrong = [name for k, name in enumerate(names) if name not in (VARIANTS if k else known)]
    if wrong:
        raise InputError(f"--ablation {', '.join(wrong)}: choose from {', '.join(VARIANTS)}")


def plan_variants(
    args: Namespace, dataset: TrajectoryDataset, title: str = ""
) -> dict[str, plan.Run]:
    """Return the run of each wanted variant by its name, stage 1 first: others build on it."""
    wanted = {STAGE_1_VARIANT, *(args.ablation or usual_variants(args, dataset))}
    return {
        name: plan.Run(f"{title}{name}", variant_arguments(name, args), dataset)
        for name in VARIANTS
        if name in wanted
    }


def usual_variants(args: Namespace, dataset: TrajectoryDataset) -> list[str]:
    """Return the variants that these data and flags allow."""
    left_out = {*([] if args.text_model else [FROZEN])}
    if baselines.WORDS not in baseline_names(run_folder.run_data(args, dataset, None)):
        left_out |= {WORDS, FROZEN}
    return [name for name in VARIANTS if name not in left_out]


def variant_arguments(name: str, args: Namespace) -> Namespace:
    """Return the arguments of a variant."""
    changes: dict[str, Any] = {"mode": "classification", **VARIANTS[name]}
    if name != STAGE_1_VARIANT:  # it lies in the output folder itself, where others find it
        changes["output_dir"] = args.output_dir / "ablation" / re.sub(r"\W+", "_", name)
    if "ode_checkpoint" in changes:
        changes["ode_checkpoint"] = args.output_dir / changes["ode_checkpoint"]
    return Namespace(**{**vars(args), "ablation": None, **changes})


def compare_variants(runs: Mapping[str, plan.Run], folder: Path, compared: Compared) -> None:
    """Compare the variants with the reference and the baselines; write ``ablation/``."""
    folder.mkdir(exist_ok=True)
    folders = {name: run_folder.stage_folder(run.args) for name, run in runs.items()}
    table, targets = compare.join_predictions(folders, with_beside=ON_TOP)
    weights = pd.DataFrame(weight_columns(targets), table.index)
    write_text(folder / "predictions_test.csv", table.join(weights).to_csv(index=False))
    metrics = evaluate(
        table,
        compared.seed,
        reference=compared.reference,
        primary=compared.primary,
        compared=COMPARED,
        targets=targets,
    )
    compare.save_comparison(
        folder / "ablation",
        metrics,
        {name: compare.cost_of(folder) for name, folder in folders.items()},
        targets,
        title=f"{ADDS}: {compared.outcome}",
        card={"Seed": str(compared.seed)},
        notice=compared.notice,
        variants=VARIANTS_ARE,
    )


# --------------------------------------------------------------------------- --seeds


def run_seeds(
    args: Namespace, read: Callable[[Namespace], TrajectoryDataset], train: plan.Train
) -> int:
    """Run the unfinished seeds from ``--seed`` on, each on its own split; pool the test parts."""
    example = args.output_dir / f"seed_{SEED}" / TRAJECTORY_FILE
    plan.check_stage1(args.ode_checkpoint, "--seeds", SEED, example)
    one_source = not any(SEED in str(path) for path in (args.data_path, args.data_dir))
    dataset: TrajectoryDataset | None = None
    runs: list[plan.Run] = []
    variants: dict[int, dict[str, plan.Run]] = {}
    folders: dict[int, Path] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        folder = args.output_dir / f"seed_{seed}"
        seed_args = plan.filled(args, SEED, seed, seed=seed, seeds=None, output_dir=folder)
        dataset = dataset if dataset and one_source else read(seed_args)
        if args.ablation is None:
            runs.append(plan.Run(f"seed {seed}", seed_args, dataset))
            folders[seed] = run_folder.stage_folder(seed_args)
        else:
            check_variants(seed_args, dataset)
            variants[seed] = plan_variants(seed_args, dataset, f"seed {seed}, ")
            runs += variants[seed].values()
            folders[seed] = folder / "ablation"
    if code := plan.carry_out(runs, train):
        return code
    if processes().is_main_process and dataset:
        compared = compared_by(args, dataset.outcome)
        with quiet_console():
            for seed, of_seed in variants.items():
                compare_variants(of_seed, folders[seed], compared._replace(seed=seed))
        pool_seeds(folders, args.output_dir, compared)
    return EXIT_DONE


def pool_seeds(folders: dict[int, Path], output_dir: Path, compared: Compared) -> None:
    """Write the metrics of all splits; ``folders`` are of the stage or the ablation, by seed."""
    paths = [*folders.values()]
    kind = paths[0].name
    if kind == "ablation":
        reference, title, by_split = compared.reference, ADDS, None
        runs = [path.parent / "trajectory" for path in paths]
        tables, targets = prediction_files.read_runs(paths, None, "ablation.json")
        costs = [read_json(path / "ablation.json")["cost"] for path in paths]
    else:
        reference, runs = STAGE_NAMES[kind], paths
        title = reference.capitalize()
        auroc_of = prediction_files.auroc_of
        by_split = pd.DataFrame({"Seed": [*folders]})
        by_split["Validation AUROC [95 %]"] = [auroc_of(path, "validation") for path in paths]
        by_split["Test AUROC [95 %]"] = [auroc_of(path, "test") for path in paths]
        tables, targets = prediction_files.read_runs(paths, reference)
        costs = [{reference: compare.cost_of(path)} for path in paths]
    targets = read_weights(targets, pd.concat(tables))
    metrics = evaluate_splits(
        tables,
        compared.seed,
        reference,
        targets=targets,
        trained=trained_patients(runs, tables),
        primary=compared.primary,
        compared=COMPARED,
    )
    auroc = metrics.row(reference, "auroc")
    compare.save_comparison(
        output_dir / f"seeds_{kind}",
        metrics,
        {name: mean_cost([cost[name] for cost in costs]) for name in costs[0]},
        targets,
        title=f"{title}, in {len(folders)} splits of the data: {compared.outcome}",
        sentences=[
            f"Over {len(folders)} splits the test AUROC of {reference} is {auroc['min']:.3f} to "
            f"{auroc['max']:.3f}, mean {value_text(auroc)}."
        ],
        card={"Seeds": f"{min(folders)} to {max(folders)}"},
        variants=VARIANTS_ARE,
        notice=compared.notice,
        splits=by_split,
    )


def trained_patients(runs: Sequence[Path], tables: Sequence[pd.DataFrame]) -> float:
    """Return the mean number of patients in the training parts of several runs."""
    rows = [read_json(run / "run.json")["split"]["train"]["n"] for run in runs]
    patients_a_row = np.mean([table["patient"].nunique() / len(table) for table in tables])
    return float(patients_a_row * np.mean(rows))


def mean_cost(costs: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Return the mean cost of the runs of one model, None where some run lacks it."""
    means = pd.DataFrame(costs).astype(float).mean(skipna=False)
    return {str(name): None if np.isnan(mean) else mean for name, mean in means.items()}
