"""What a run was made with: versions, commit, code, memory."""

from __future__ import annotations

import contextlib
import gc
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


def reset_peak_memory() -> None:
    """Forget the peak so far, so that the next one is of the run that begins here.

    The peak of the process itself can be reset on Linux alone.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float | None:
    """Return the most memory that the GPU has held, without one the process, in MiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return _host_peak_mib()


def _host_peak_mib() -> float | None:
    """Return the peak of the process; None on Windows."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def peak_memory() -> str:
    """Describe the most memory that the process, and its GPU, have held."""
    import torch

    shown = ""
    if torch.cuda.is_available():
        used, size = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        shown = f", GPU {used / 2**20:,.0f} of {size / 2**20:,.0f} MiB"
    host = _host_peak_mib()
    return f"peak memory {'unknown' if host is None else f'{host:,.0f} MiB'}{shown}"
