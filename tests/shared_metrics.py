"""Metrics of a finished run as its checkpoint holds them."""


def metric(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def run_metrics(events=20, n=60, **more):
    """Content of metrics.json whose parts have so many events among so many patients."""
    ranking = {"auroc": metric(0.7), "auprc": metric(0.4), "brier": metric(0.1)}
    ranking |= {"oe": metric(1.1)}
    calibration = {"slope": metric(0.9), "intercept": metric(0.3)}
    part = {
        **{"n": n, "patients": n, "events": events, "minority_patients": min(events, n - events)},
        **{"model": "stage 1 (trajectory alone)", **ranking, **calibration},
        **{"sensitivity": metric(3 / 7), "specificity": metric(0.9)},
        "primary": "last value",
        "models": {"last value": {"reference": "stage 1 (trajectory alone)", **ranking}},
    }
    return {
        **{"stage": "trajectory", "averaged_epochs": [[3]], "threshold": 0.15},
        **{"calibration": {"method": "none"}, "validation": part, "test": part, **more},
    }
