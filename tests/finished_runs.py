"""Folders as finished stages leave them, without any training."""

import json

import numpy as np
import pandas as pd

from medgemma_clinical.commands.run_folder import RUN_FORMAT
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.evaluation.target import LABEL

ROWS, EVENTS = 60, 20


def write_run(folder, seed=0, data=None, baseline="last value"):
    """Write the predictions, metrics, history and data of a finished stage, drawn by ``seed``.

    ``data`` is what ``run.json`` says of the data, beside the names of the patients.
    """
    folder.mkdir(parents=True)
    labels = np.tile([0, 0, 1], ROWS // 3)
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"id": [f"00{k}" for k in range(ROWS)], "label": labels})
    table["probability"] = rng.uniform(size=ROWS)
    table["patient"] = ["NA" if k < 2 else f"p{k // 2}" for k in range(ROWS)]
    table[baseline] = 0.3 * labels + 0.5 * rng.uniform(size=ROWS)
    table.to_csv(folder / "predictions_test.csv", index=False)
    name = STAGE_NAMES.get(folder.name, "model")
    test = evaluate(table.rename(columns={"probability": name}), 0, 0.5).to_json()
    validation = {**test, "auroc": {"value": float(rng.uniform()), "low": 0.1, "high": 0.9}}
    content = {"targets": [LABEL.to_json()], "validation": validation, "test": test}
    (folder / "metrics.json").write_text(json.dumps(content))
    lines = [json.dumps({"epoch": k + 1, "seconds": float(k)}) for k in range(3)]
    (folder / "history.jsonl").write_text("\n".join(lines) + "\n")
    known = {
        "data": {"has_patient_ids": True, "rows_sha256": "a", "outcome": "Death", **(data or {})}
    }
    known["split"] = {"train": {"n": 160}}  # of 80 patients
    known["cost"] = {"tokens": 12.0, "memory_mib": 100.0 + seed}
    (folder / "run.json").write_text(json.dumps({"format": RUN_FORMAT, **known}))
    return folder
