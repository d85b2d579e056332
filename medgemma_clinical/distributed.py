"""The processes that share a run, their device, and the progress that the first one shows."""

from __future__ import annotations

import contextlib
import glob
import importlib
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from medgemma_clinical.files import InputError

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from torch import nn

logger = logging.getLogger(__name__)

GPUS = "/dev/nvidia[0-9]*"
"""Linux shows NVIDIA's GPUs here, whatever torch thinks of them."""

SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What accelerate's launcher sets for ways of training that cut a model into parts."""

SECONDS_A_LINE = 60.0
"""Without a terminal, long work logs its progress so often."""


@cache
def processes() -> PartialState:
    """Return accelerate's state of this run: device, and the processes that share the work."""
    import torch
    from accelerate import PartialState

    # NVIDIA's containers ask for TF32, with ten bits, by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
    torch.set_float32_matmul_precision("highest")
    return PartialState(cpu=not torch.cuda.is_available())


def default_device() -> torch.device:
    """Return the GPU of this process, or the CPU."""
    device: torch.device = processes().device
    return device


def find_device(name: str) -> torch.device:
    """Return a device by its name, as in ``torch.device``.

    Raises:
        InputError: there is no such device.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {name!r}: not on this machine: give cpu or cuda") from error
    return device


def check_gpu() -> None:
    """Refuse the CPU of a machine whose GPU torch cannot use, unless the GPU is hidden on purpose.

    Raises:
        InputError: saying how torch and the driver come to fit.
    """
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    unused = torch.version.cuda and not torch.cuda.is_available()
    if unused and not hidden and glob.glob(GPUS):
        raise InputError(
            f"torch for CUDA {torch.version.cuda} cannot use this machine's NVIDIA GPU: see what "
            "nvidia-smi says; install a newer driver (CUDA 13 needs 580 or later), or torch for an "
            "older one (pip install --force-reinstall torch --index-url "
            "https://download.pytorch.org/whl/cu126), or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )


def check_launch() -> None:
    """Refuse a launch that asks to cut the model into parts: each process trains the whole one.

    Raises:
        InputError: naming what accelerate's configuration asks for.
    """
    for variable, way in SHARDING.items():
        if os.environ.get(variable, "").lower() == "true":
            raise InputError(
                f"accelerate's configuration asks for {way}, and each process of this program "
                "trains a whole model: give distributed_type: MULTI_GPU there (see "
                "medgemma_clinical/docs/hardware.md)"
            )


def check_flash_attention(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse the kernels of flash-attn where they cannot run.

    Where the package is missing, transformers would take a kernel of the hub, which is code.

    Args:
        dtype: of the computation.
        device: of the weights.

    Raises:
        InputError: naming what is missing.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available

    if device.type != "cuda":
        lack = "an NVIDIA GPU, and this run takes the CPU"
    elif dtype != torch.bfloat16:
        lack = "--precision bf16"
    elif not (is_flash_attn_2_available() and _imports("flash_attn")):
        lack = "the package flash-attn, 2.3.3 or later and built for this torch"
    else:
        return
    raise InputError(f"--attention flash_attention_2 needs {lack}: or leave the flag out")


def _imports(package: str) -> bool:
    """Return whether a package can be imported; one that was built for another torch cannot."""
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def gather(items: list[Any]) -> list[Any]:
    """Join the lists of all processes, in the order of the processes."""
    if processes().num_processes == 1:
        return items
    from accelerate.utils import gather_object

    joined: list[Any] = gather_object(items)
    return joined


def sum_over_processes(*numbers: float) -> Sequence[float]:
    """Add up each number over all processes."""
    if processes().num_processes == 1:
        return numbers
    import torch
    from accelerate.utils import reduce

    own = torch.tensor(numbers, dtype=torch.float64, device=processes().device)
    total: torch.Tensor = reduce(own, "sum")
    return total.tolist()


def without_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let gradients accumulate without exchange between processes."""
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)
    context: contextlib.AbstractContextManager[None] = no_sync()
    return context


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every part of a batch to a device."""
    return {name: part.to(device, non_blocking=True) for name, part in batch.items()}


def progress(items: Iterable[Any], title: str, total: int, done: int = 0) -> Iterator[Any]:
    """Yield items under a progress bar; without terminal and notebook a line a minute is logged.

    Args:
        items: those that are left.
        title: of the bar and the lines.
        total: items in all.
        done: of them, those before the first.
    """
    from tqdm import tqdm

    if not processes().is_main_process:
        yield from items
        return
    terminal = sys.stderr.isatty() or "ipykernel" in sys.modules  # a notebook is no terminal
    last = time.monotonic()
    bar = tqdm(items, title, total=total, initial=done, leave=False, disable=not terminal)
    for number, item in enumerate(bar, done + 1):
        yield item
        if not terminal and time.monotonic() - last >= SECONDS_A_LINE:
            last = time.monotonic()
            logger.info("%s: %d of %d", title, number, total)
