"""What the tests of pages share: content, a page of it, and its tags."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from medgemma_clinical.evaluation.cohort import Cohort, cohort_figures

from medgemma_clinical.evaluation.report import ReportContent, write_report

OUTCOME = "Death <b>& $x$ decay"
"""What a user writes stays text."""


def make_content(**more: Any) -> ReportContent:
    history = [
        {"epoch": k, "train_loss": 1 / k, "val_loss": 1.1 / k, "val_auroc": 0.6, "improved": k < 3}
        for k in range(1, 6)
    ]
    parts = {"question": {"Outcome": OUTCOME}, "data": {}, "card": {"Seed": "0"}}
    return ReportContent("A model", OUTCOME, **{**parts, "history": history, **more})


def write_page(
    cohort: Cohort,
    folder: Path,
    content: ReportContent | None = None,
    fewest: int = 0,
    **options: Any,
) -> str:
    path = folder / "report.html"
    figures = cohort_figures(cohort, 0.3, 0, fewest)
    write_report(path, cohort, figures, content or make_content(), **options)
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """A page: tags that are still open, all tags with their attributes, and the visible text."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def images(self) -> list[tuple[str, str]]:
        """Return the alternative text and the SVG source of each picture."""
        found = [attributes for tag, attributes in self.tags if tag == "img"]
        prefix = "data:image/svg+xml;base64,"
        sources = [each["src"] or "" for each in found]
        assert all(source.startswith(prefix) for source in sources)
        decoded = [base64.b64decode(source.removeprefix(prefix)).decode() for source in sources]
        return list(zip([each["alt"] or "" for each in found], decoded, strict=True))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
