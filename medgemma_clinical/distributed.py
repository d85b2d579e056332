"""The processes that share a run, their device and its memory, and how exactly it computes."""

from __future__ import annotations

import contextlib
import gc
import glob
import os
import re
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import torch
from accelerate import PartialState
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from medgemma_clinical.files import InputError, RunFault, is_out_of_memory

GPUS = "/dev/nvidia[0-9]*"
"""Linux shows NVIDIA's GPUs here, whatever torch thinks of them."""

OLD_CARDS = 'pip install "torch==2.10.*" --index-url https://download.pytorch.org/whl/cu126'
"""Installs kernels for Pascal and Volta, too.

Source: torch.cuda.PYTORCH_RELEASES_CODE_CC.
"""

SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""What accelerate's launcher sets for ways of training that cut a model into parts."""

LONGEST_WAIT = timedelta(hours=2)
"""The other processes wait so long while the first one fits baselines and writes results."""

TOO_LONG = (
    "a single row does not fit the memory: train with shorter series or texts by --max_len, "
    "--series_text or --max_text_tokens, or take --quantization nf4"
)


def set_environment() -> None:
    """Set what libraries read; whatever begins work calls it, an import does not."""
    # The hub learns nothing of the user.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Nor does the hub's compiled code run: transformers would exchange layers for it, and
    # bitsandbytes fetches it where transformers has brought ``kernels``.
    os.environ["USE_HUB_KERNELS"] = "NO"
    sys.modules["kernels"] = None  # type: ignore[assignment]
    # Python tells of the semaphores that it clears up after processes which a signal has ended.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True


@cache
def processes() -> PartialState:
    """Return accelerate's state of this run: device, and the processes that share the work."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)


def default_device() -> torch.device:
    """Return the GPU of this process, or the CPU."""
    device: torch.device = processes().device
    return device


def derived_seed(seed: int, number: int) -> int:
    """Return the seed of part ``number`` of a run: the run's own for the first, else another."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence([seed % 2**32, number]).generate_state(1)[0])


def find_device(name: str) -> torch.device:
    """Return a device by its name, as in ``torch.device``."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device, dtype=torch.float64)  # which Apple's GPUs lack
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {name!r}: not on this machine: give cpu or cuda") from error
    return device


def check_gpu() -> None:
    """Refuse a GPU that torch cannot use, and the CPU in its place unless that is on purpose."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    unused = torch.version.cuda and not torch.cuda.is_available()
    if unused and not hidden and glob.glob(GPUS):
        raise InputError(
            f"torch for CUDA {torch.version.cuda} cannot use this machine's NVIDIA GPU: install a "
            "newer driver, or torch for an older one (medgemma_clinical/docs/training.md), or set "
            "CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    device = default_device()
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        if is_out_of_memory(error):
            return  # what needs the GPU says so; export does not
        if "no kernel image" in str(error):
            raise InputError(
                f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)}"
                f": an older card needs {OLD_CARDS}, a newer one a newer torch"
            ) from error
        problem = str(error).partition("\n")[0]
        raise InputError(
            f"the GPU fails at its first use ({problem}): try PYTORCH_ALLOC_CONF="
            "expandable_segments:False in the environment (medgemma_clinical/docs/faq.md)"
        ) from error


def leave_together() -> None:
    """Wait for the other processes of the run, and part from them."""
    if processes().num_processes > 1:
        processes().wait_for_everyone()
        processes().destroy_process_group()


def check_launch() -> None:
    """Refuse a launch that cuts the model into parts: each process trains all of it."""
    for variable, way in SHARDING.items():
        if os.environ.get(variable, "").lower() == "true":
            raise InputError(
                f"accelerate's configuration asks for {way}: give distributed_type: MULTI_GPU "
                "there (see medgemma_clinical/docs/training.md)"
            )


@contextlib.contextmanager
def exact_kernels(*, deterministic: bool = False) -> Iterator[None]:
    """Compute float32 with all bits for a block; ``deterministic`` kernels repeat to the last bit.

    Source: PyTorch's notes on reproducibility.
    """
    precision = torch.get_float32_matmul_precision()
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    # NVIDIA's containers ask for TF32, with ten bits.
    torch.set_float32_matmul_precision("highest")
    # On Hopper cards it has given NaN gradients for masked batches.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
        torch.use_deterministic_algorithms(was_deterministic)


@contextlib.contextmanager
def computing(*, deterministic: bool = False) -> Iterator[None]:
    """Compute for a block of a command: refuse a launch or a GPU that does not fit, be exact."""
    set_environment()
    check_launch()
    check_gpu()
    with exact_kernels(deterministic=deterministic):
        yield


def stage1_threads() -> int:
    """Return the threads that stage 1 computes with: those of OMP_NUM_THREADS, else one."""
    # Its steps are small: more threads gain little, and beside other work each step waits for all.
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # of nested loops a list
    return max(1, int(asked)) if asked.isdecimal() else 1


@contextlib.contextmanager
def few_threads(*, stage1: bool = True) -> Iterator[None]:
    """Compute a block of stage 1, or of baselines, with its threads; of others as torch does."""
    if not stage1:
        yield
        return
    threads_before = torch.get_num_threads()
    threads = stage1_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):  # of numpy, which stands behind the regressions
            yield
    finally:
        torch.set_num_threads(threads_before)


def show_progress(items: Iterable[Any], title: str, total: int, done: int = 0) -> tqdm[Any]:
    """Show a bar while items are used; without terminal and notebook, a line a minute."""
    notebook = "ipykernel" in sys.modules  # is no terminal; a bar that flashes moves its page
    terminal = sys.stderr.isatty() or notebook
    return tqdm(
        iter(items),  # tqdm.auto would begin to iterate twice
        title,
        total=total,
        initial=done,
        leave=not terminal,
        bar_format=None if terminal else "{desc}: {percentage:.0f} %, {remaining} left\n",
        mininterval=0.1 if terminal else 60,
        maxinterval=10 if terminal else 60,
        position=None if terminal else 0,  # a lower line would need control characters
        delay=int(notebook) if terminal else 60,
        disable=not processes().is_main_process,
    )


def compute_batches(
    batches: Iterable[list[int]], compute: Callable[[list[int]], Any]
) -> Iterator[tuple[list[int], Any]]:
    """Yield rows and what is computed of them; a batch that does not fit the memory is halved."""
    max_rows = sys.maxsize  # batches are sorted by length: none behind it has room for more
    for batch in batches:
        waiting = [batch]
        while waiting:
            rows = waiting.pop()
            half = len(rows) // 2
            if len(rows) <= max_rows:
                try:
                    result = compute(rows)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(rows) == 1:
                        raise RunFault(TOO_LONG) from error
                    max_rows = len(rows) - half
                else:
                    yield rows, result
                    continue
            waiting += [rows[half:], rows[:half]]


def reset_peak_memory() -> None:
    """Forget the peak so far; that of the process itself can be reset on Linux alone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Return the most memory that the GPU has held, without one the process, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return process_peak_mib()


def process_peak_mib() -> float:
    """Return the most memory that the process has held; on Linux since it was forgotten."""
    status = Path("/proc/self/status")
    if status.exists():
        (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return int(peak) / 2**10
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but on macOS
    return peak_bytes / 2**20 if sys.platform == "darwin" else peak_bytes / 2**10


def peak_memory() -> str:
    """Describe the most memory that the process, and its GPU, have held."""
    text = f"peak memory {process_peak_mib():,.0f} MiB"
    if torch.cuda.is_available():
        used = torch.cuda.max_memory_allocated() / 2**20
        size = torch.cuda.mem_get_info()[1] / 2**20
        text += f", GPU {used:,.0f} of {size:,.0f} MiB"
    return text
