"""Folders as finished stages leave them, without any training."""

import json

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from medgemma_clinical.commands import run_folder

ROWS, EVENTS = 60, 20


def write_run(folder, seed=0, data=None, baseline="last value", stage_1=None):
    """Write the predictions, figures, history and data of a finished stage.

    Args:
        folder: of the stage, made here.
        seed: of the predictions.
        data: what ``run.json`` says of the data, beside the names of the patients.
        baseline: name of the one baseline.
        stage_1: SHA-256 of the stage 1 that it reads.
    """
    folder.mkdir(parents=True)
    labels = np.tile([0, 0, 1], ROWS // 3)
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"id": [f"00{k}" for k in range(ROWS)], "label": labels})
    table["probability"] = rng.uniform(size=ROWS)
    table["patient"] = ["NA" if k < 2 else f"p{k // 2}" for k in range(ROWS)]
    table[baseline] = 0.3 * labels + 0.5 * rng.uniform(size=ROWS)
    table.to_csv(folder / "predictions_test.csv", index=False)
    auroc = {"value": roc_auc_score(labels, table["probability"]), "low": 0.1, "high": 0.9}
    validation = {"value": float(rng.uniform()), "low": 0.1, "high": 0.9}
    metrics = {"validation": {"auroc": validation}, "test": {"auroc": auroc}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    lines = [json.dumps({"epoch": k + 1, "seconds": float(k)}) for k in range(3)]
    (folder / "history.jsonl").write_text("\n".join(lines) + "\n")
    content = {"data": {"named": True, "rows_sha256": "a", "outcome": "Death", **(data or {})}}
    content["stage_1_sha256"] = stage_1
    content["cost"] = {"tokens": 12.0, "memory_mib": 100.0 + seed}
    run_folder.write_run(folder, {"format": run_folder.RUN_FORMAT, **content})
    return folder
