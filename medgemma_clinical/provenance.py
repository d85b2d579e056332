"""What a run was made with: versions, commit, code; its record, ``run.json``."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from medgemma_clinical import __version__
from medgemma_clinical.files import InputError, read_json

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "torchdiffeq",
    "scikit-learn",
    "lightgbm",
)
PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
"""The folder of the program: the four top-level files and this package."""

TOP_LEVEL = ("dataset_format.py", "dte_encoder.py", "medgemma_trainer.py", "srtr_dataset.py")

RUN_FORMAT = 6
"""Of ``run.json``; rises when runs of older versions can no longer be resumed."""

METRICS, HISTORY = "metrics.json", "history.jsonl"
"""Files of a finished stage, beside ``run.json``."""


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``run.json``, None where there is none."""
    path = folder / "run.json"
    try:
        run = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        run = None
    if not isinstance(run, dict) or run.get("format") != RUN_FORMAT:
        raise InputError(f"{path}: damaged or of another version: start again without --resume")
    return run


def versions() -> dict[str, str]:
    """Return the versions of the program, of Python and of what else a result depends on."""
    program = {"medgemma-clinical": __version__, "python": sys.version.split()[0]}
    return program | {name: metadata.version(name) for name in PACKAGES}


@cache
def git_commit() -> str | None:
    """Return the commit of the program's folder, None where it is not the top of a checkout."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    # An installed program may lie in an environment within another checkout.
    return lines[1] if len(lines) == 2 and Path(lines[0]).samefile(ROOT) else None


def code_files() -> list[Path]:
    """Return the program's own modules, SQL and page templates."""
    # An installed program lies beside the modules of other packages: name its own.
    paths = [ROOT / name for name in TOP_LEVEL]
    for ending in ("py", "sql", "j2"):
        paths += PACKAGE.rglob(f"*.{ending}")
    return sorted(paths)


@cache
def code_hash() -> str:
    """Return the SHA-256 of ``code_files``."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def describe_program() -> dict[str, str]:
    """Return versions, commit and hash of the code as lines of a page."""
    return {
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "Commit": git_commit() or "not known",
        "SHA-256 of the code": code_hash(),
    }
