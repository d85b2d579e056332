"""What the benchmarks share: the machine in a line, the peak memory of a process, medians.

Imports nothing large: a measured process begins with the memory of its parent.
"""

import importlib
import os
import platform
import resource
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "medgemma_clinical" / "sample" / "physionet2012_bicarbonate.csv"
CHEMISTRY = ROOT / "tests" / "data" / "physionet2012_chemistry.csv.gz"


def machine(*packages: str, threads: int | None = None) -> str:
    """Return what figures depend on: processor, cores, threads, load, versions."""
    cores = f"{os.cpu_count()} cores" + (f", {threads} threads" if threads else "")
    versions = ", ".join(f"{name} {installed(name)}" for name in packages)
    return (
        f"{processor()}, {cores}, load {os.getloadavg()[0]:.1f}; {platform.system()}, "
        f"Python {platform.python_version()}, {versions}"
    )


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def needed(module: str, package: str) -> ModuleType:
    """Return a module of a package that only benchmarks use, or stop with how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install {package}") from error


def processor() -> str:
    """Return the name of the processor, as precisely as the system knows it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_mib() -> float:
    """Return the peak memory of this process: Linux passes getrusage's figure on to children."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the median and, in brackets, the least and the most."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def freeze_stage1(stage: Any) -> None:
    """Freeze stage 1 and encode each row ahead, as a run with ``--ode_checkpoint`` does.

    Args:
        stage: ``Stage`` 2 or 3; its model moves to the default device.
    """
    from medgemma_clinical.distributed import default_device

    model = stage.model.to(default_device())
    model.stage1.requires_grad_(False)
    stage.text.encode(model.stage1, model.tokens, default_device())
