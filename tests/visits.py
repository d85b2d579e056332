"""A cohort of patients with one to three rows each."""

import numpy as np
import pandas as pd

from trajectories import LABEL, SERIES


def cohort(patients=200, seed=0):
    """Make one to three rows a patient, a fifth of the patients with the event in one of them."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        for visit in range(int(rng.integers(1, 4))):
            series = " -> ".join(f"{rng.integers(5, 40)} ({4 * k}h)" for k in range(3))
            event = int(patient % 5 == 0 and visit == 0)
            rows.append((f"P{patient:03d}", series, f"visit {visit}", event))
    return pd.DataFrame(rows, columns=["subject_id", SERIES, "clinical_context", LABEL])
