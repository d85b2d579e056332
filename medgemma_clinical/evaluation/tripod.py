"""``tripod.md``: the items of the reporting guideline TRIPOD+AI, as far as a run knows them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
from jinja2 import Environment

from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.data.texts import code
from medgemma_clinical.evaluation import tables
from medgemma_clinical.evaluation.metrics_table import Metrics
from medgemma_clinical.evaluation.verdicts import interval_text, percent

if TYPE_CHECKING:
    from medgemma_clinical.evaluation.report import ReportContent

MEASURES = (
    *("auroc", "auprc", "brier", "calibration_slope", "calibration_in_the_large", "e_average"),
    *("sensitivity", "specificity", "ppv", "npv"),
)

AUTHOR = "**for the author**"
"""Stands where no program knows the answer."""


def tripod(
    pages: Environment,
    content: ReportContent,
    metrics: Metrics,
    numbers: Mapping[str, pd.DataFrame],
) -> str:
    """Return the items as Markdown, from what a report shows; ``pages`` holds the template.

    Metrics, and the tables ``numbers``, are suppressed where small counts are hidden.
    """
    known = tables.metric_table(metrics, MEASURES).to_dict("records")
    groups = numbers.get("subgroups", pd.DataFrame())
    filled = (
        pages.overlay(autoescape=False)
        .get_template("tripod.md.j2")
        .render(
            content=content,
            known=known,
            others=", ".join(map(code, metrics.models[1:])),
            parts=numbers["split"].to_dict("records") if "split" in numbers else [],
            flow=numbers["flow"].to_dict("records") if "flow" in numbers else [],
            groups=groups.to_dict("records"),
            numbers=numbers,
            facts=defaultdict(str, content.methods or {}),
            AUTHOR=AUTHOR,
            **{"code": code, "number": count_text, "interval": interval_text, "percent": percent},
        )
    )
    return f"{filled}\n"
