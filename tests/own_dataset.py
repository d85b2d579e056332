"""The data set class that CONTRIBUTING shows: all that a subclass must bring."""

import numpy as np

from medgemma_clinical.data.trajectories import TrajectoryDataset


class Lactate(TrajectoryDataset):
    """Lactate every four hours of patients with one row each; the event follows high values."""

    name, source = "lactate", "lactate"
    features, units = ("Lactate",), ("mmol/L",)
    question, outcome, time_scale = "Will this patient die?", "Death", 24.0

    def __init__(self, values, labels):
        """Take ``values`` (N, L) and ``labels`` (N,)."""
        n, length = values.shape
        self.times, self.values = np.tile(np.arange(length) * 4.0, n), values.reshape(-1, 1)
        self.offsets = np.arange(n + 1) * length
        self.labels, self.ids = labels.astype(float), np.arange(n).astype(str)
        self.groups, self.contexts = self.ids, np.full(n, "", dtype=object)
        self.static, self.read_options = np.empty((n, 0)), {}
