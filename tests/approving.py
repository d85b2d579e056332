"""The visible text of a page beside its approved file; ``ACCEPT=1`` in the environment accepts."""

import os
from pathlib import Path

APPROVED = Path(__file__).parent / "approved"


def assert_approved(name, text):
    """Compare a text, a sentence a line, with ``approved/NAME.txt``."""
    path, text = APPROVED / f"{name}.txt", text.replace(". ", ".\n") + "\n"
    if os.environ.get("ACCEPT"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
