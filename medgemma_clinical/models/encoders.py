"""Encoders of the user's own in place of ``ClinicalODERNN``, by a name "package.module:Class"."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any

from torch import nn

from medgemma_clinical.files import InputError

MEMBERS = ("config", "hidden_dim", "dropout", "longest_gap_hours")
METHODS = ("fit_normalizer", "plan", "run")
"""What stage 1 asks of an encoder; ``docs/python.md`` says more."""

ENCODERS: dict[str, type[nn.Module]] = {}
"""The classes that the user gave to this process; a checkpoint names one and imports nothing."""

logger = logging.getLogger(__name__)


def register(encoder: type | str) -> str:
    """Keep a class, or that of a name "package.module:Class" of the user's; return the name."""
    if isinstance(encoder, str):
        if encoder in ENCODERS:
            return encoder
        encoder = _import(encoder)
    name = f"{encoder.__module__}:{encoder.__qualname__}"
    absent = [method for method in METHODS if not callable(getattr(encoder, method, None))]
    if absent or not issubclass(encoder, nn.Module):
        needed = ", ".join((*MEMBERS, *METHODS))
        raise InputError(f"encoder {name}: not a torch.nn.Module with {needed}")
    if encoder.__module__ == "__main__" and name not in ENCODERS:
        logger.warning(
            "encoder %s: folds and the command line cannot load a class of a script or notebook: "
            "put it into a module of its own",
            name,
        )
    ENCODERS[name] = encoder
    return name


def _import(name: str) -> type:
    module, _, member = name.partition(":")
    sys.path.append(os.getcwd())  # as ``python -m`` does, but behind all that is installed
    try:
        encoder = getattr(importlib.import_module(module), member)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"encoder {name}: no such package.module:Class ({error})") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(encoder, type):
        raise InputError(f"encoder {name}: not a class")
    return encoder


def find_encoder(name: str | None, default: type[nn.Module]) -> Any:
    """Return the class of a checkpoint's name, None being the program's own encoder."""
    if name is None:
        return default
    if name not in ENCODERS:
        raise InputError(
            f"its encoder {name} names a class that is not part of this program: load it only if "
            "you wrote or read that code"
        )
    return ENCODERS[name]


def encoder_name(encoder: nn.Module) -> str | None:
    """Return the name of the class of an encoder, None for the program's own."""
    return next((name for name, kind in ENCODERS.items() if type(encoder) is kind), None)
