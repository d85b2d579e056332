"""The benchmark of censoring once at small size."""

import re

import censoring
import numpy as np
import pandas as pd
from common import SAMPLE


def test_the_benchmark_of_censoring_prints_every_metric(tmp_path, capsys):
    table = pd.read_csv(SAMPLE, dtype=str).head(400)
    data, outcomes = tmp_path / "data.csv", tmp_path / "outcomes.csv"
    table.to_csv(data, index=False)
    rng = np.random.default_rng(0)
    hours, event = rng.exponential(100, 400), 2 - table["label_escalation"].astype(int)
    hours[0] = -1  # was not there any more
    columns = {"subject_id": table["subject_id"], "event_hours": hours, "event": event}
    pd.DataFrame(columns).iloc[:390].to_csv(outcomes, index=False)
    words = ["--data", str(data), "--outcomes", str(outcomes), "--horizon_hours", "96"]
    assert censoring.main([*words, "--censorings", "2"]) == 0
    out = capsys.readouterr().out
    assert "389 rows" in out
    rows = re.findall(r"^\| (\w+)((?: \| -?[\d.]+(?: \([\d.]+\))?){5}) \|$", out, re.MULTILINE)
    assert [name for name, _ in rows] == censoring.METRICS
