"""Whose arrays operands are, and where they lie. Imports no array library."""

from __future__ import annotations

from typing import Any


def whereabouts(x: Any) -> tuple[str, str]:
    """Where ``x`` lies: the kind of device, and the architecture if that is a GPU."""
    if is_torch(x):
        kind = str(x.device.type)
        if kind != "cuda":
            return kind, ""
        from isoform.kernels import torch_library

        return kind, torch_library.architecture(x.device.index)
    if not _is_of("cupy", x):
        return "cpu", ""
    return "cuda", f"sm_{x.device.compute_capability}"


def is_torch(x: Any) -> bool:
    """Whether ``x`` is a tensor of PyTorch's."""
    return _is_of("torch", x)


def _is_of(library: str, x: Any) -> bool:
    """Whether ``x`` is an array of ``library`` or of a class made from one. Imports neither."""
    return any(base.__module__.partition(".")[0] == library for base in type(x).__mro__)
