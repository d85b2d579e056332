"""GRU-D, an encoder in place of ``ClinicalODERNN``: the example of docs/python.md.

Letters: B patients, L observations, F features, H state.
"""

import math

import torch
from torch import nn
from torch.nn.functional import dropout, relu

from medgemma_clinical.models.scaler import Scaler


class GRUD(nn.Module):
    """A GRU whose state and last values decay towards zero between observations.

    Source: Che et al. 2018, "Recurrent Neural Networks for Multivariate Time Series with Missing
    Values".
    """

    longest_gap_hours = math.inf

    def __init__(self, input_dim, hidden_dim=32, time_scale=72.0, dropout=0.0):
        super().__init__()
        self.config = {"input_dim": input_dim, "hidden_dim": hidden_dim}
        self.config |= {"time_scale": time_scale, "dropout": dropout}
        self.hidden_dim, self.time_scale, self.dropout = hidden_dim, time_scale, dropout
        self.scaler = Scaler(input_dim)
        self.value_decay = nn.Parameter(torch.zeros(input_dim))
        self.state_decay = nn.Linear(1, hidden_dim)
        self.update = nn.GRUCell(2 * input_dim, hidden_dim)

    def fit_normalizer(self, values, observed, groups=None):
        """Fit to the training part: values (N, F), observed (N, F) bool, patients (N,)."""
        self.scaler.fit(values.masked_fill(~observed, math.nan), groups)

    def plan(self, times, values, observed, until):
        """Return what ``run`` reads of a batch: (B, L), (B, L, F), (B, L, F) and (B,)."""
        return times, values, observed, until

    def run(self, plan):
        """Return the states (B, L + 1, H): after each observation, and at the prediction time."""
        times, values, observed, until = (x.to(self.scaler.std) for x in plan)
        observed, present = observed.bool(), observed.any(dim=2)
        z = self.scaler(values.masked_fill(~observed, math.nan))
        state = z.new_zeros(len(z), self.hidden_dim)
        latest, since, clock = z.new_zeros(z[:, 0].shape), z.new_zeros(z[:, 0].shape), times[:, 0]
        states = []
        for step in range(z.shape[1]):
            here, measured = present[:, step, None], observed[:, step]
            gap = (times[:, step] - clock)[:, None] / self.time_scale
            since = torch.where(here, since + gap, since)
            latest = torch.where(measured, z[:, step], latest)
            decayed = latest * torch.exp(-relu(self.value_decay) * since)
            read = torch.cat([torch.where(measured, z[:, step], decayed), measured.to(z)], dim=1)
            new = self.update(read, self.decay(state, gap))
            state = torch.where(here, new, state)
            since, clock = (
                since.masked_fill(measured, 0),
                torch.where(here[:, 0], times[:, step], clock),
            )
            states.append(new.masked_fill(~here, 0))
        states.append(self.decay(state, (until - clock)[:, None] / self.time_scale))
        return dropout(torch.stack(states, dim=1), self.dropout, self.training)

    def decay(self, state, gap):
        """Return the state (B, H) after a gap (B, 1)."""
        return state * torch.exp(-relu(self.state_decay(gap)))
