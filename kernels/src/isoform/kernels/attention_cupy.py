"""Attention over a sequence for CuPy's arrays: results allocated by CuPy, on its current stream."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import cupy

from isoform.kernels.attention_arguments import ATTENTION, Options
from isoform.kernels.attention_choice import Kernel
from isoform.kernels.cupy_arrays import run
from isoform.kernels.launch import Pass
from isoform.reference.attention_contract import DIFFERENTIABLE, PLACES, SequenceShape


def forward(
    kernel: Kernel,
    operands: Mapping[str, Any],
    options: Options,
    scale: float,
    *,
    return_lse: bool,
) -> tuple[Any, Any]:
    """``out``, and ``lse`` or None, of operands that have been checked."""
    q = operands["q"]
    B, Q, H, _ = q.shape
    with cupy.cuda.Device(q.device.id):
        results = {"out": cupy.empty(q.shape, cupy.float32 if options.wide else q.dtype)}
        if return_lse:
            results["lse"] = cupy.empty((B, H, Q), cupy.float32)
        arrays = {**_with_wide_places(operands), **results}
        _run(kernel.forward_of(options), (kernel.name, options), arrays, scale)
    return results["out"], results.get("lse")


def backward(
    kernel: Kernel, arrays: Mapping[str, Any], options: Options, scale: float
) -> list[Any]:
    """``dq, dk, dv``, by ``lse`` and either ``out`` or ``delta``."""
    q, lse = arrays["q"], arrays["lse"]
    with cupy.cuda.Device(q.device.id):
        dtype = cupy.float32 if options.wide else q.dtype
        gradients = {f"d{name}": cupy.empty(arrays[name].shape, dtype) for name in DIFFERENTIABLE}
        given = {"delta": cupy.empty(lse.shape, cupy.float32), **_with_wide_places(arrays)}
        _run(
            kernel.backward_of(options, DIFFERENTIABLE),
            (kernel.name, options, *DIFFERENTIABLE),
            {**given, **gradients},
            scale,
        )
    return list(gradients.values())


def _with_wide_places(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, positions and segments among them as kernels read them: int64 ``[B, L]``."""
    B = arrays["q"].shape[0]
    places = {
        name: cupy.broadcast_to(x.astype(cupy.int64, copy=False), (B, x.shape[-1]))
        for name, x in arrays.items()
        if name in PLACES
    }
    return {**arrays, **places}


def _run(one: Pass, which: Hashable, arrays: Mapping[str, Any], scale: float) -> None:
    """Launch the pass ``one``, known by ``which``, on CuPy's current stream."""

    def shape() -> SequenceShape:
        B, Q, H, D = arrays["q"].shape
        K, G = arrays["k"].shape[1:3]
        return SequenceShape(B, Q, K, H, G, D)

    run(one, ("attention", which), shape, arrays, scale, ATTENTION)
