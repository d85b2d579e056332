"""What a run was made with: versions, commit, code, memory."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "torchdiffeq", "scikit-learn")
ROOT = Path(__file__).parent.parent
"""The folder of the program: the four top-level files and this package."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    return {"python": sys.version.split()[0], **{p: metadata.version(p) for p in PACKAGES}}


def git_commit() -> str | None:
    """Return the commit of the program's folder, None where it is no checkout."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def code_hash() -> str:
    """Return the SHA-256 of the program's own modules and page templates, package included."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    files = [*ROOT.glob("*.py"), *package.rglob("*.py"), *package.rglob("*.j2")]
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def peak_memory() -> str:
    """Describe the most memory that the process, and its GPU, have held."""
    import torch

    shown = ""
    if torch.cuda.is_available():
        used, size = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        shown = f", GPU {used / 2**20:,.0f} of {size / 2**20:,.0f} MiB"
    try:
        import resource
    except ImportError:  # not on Windows
        return f"peak memory unknown{shown}"
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return f"peak memory {host:,.0f} MiB{shown}"
