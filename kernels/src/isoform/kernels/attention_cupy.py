"""Attention over a sequence for CuPy's arrays: results allocated by CuPy, on its current stream."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import cupy

from isoform.kernels.arguments import View
from isoform.kernels.attention_arguments import ATTENTION, Options
from isoform.kernels.attention_choice import Kernel
from isoform.kernels.launch import Description, Pass, prepared
from isoform.reference.attention_contract import DIFFERENTIABLE, PLACES, SequenceShape
from isoform.reference.contract import dtype_name


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
    q = arrays["q"]
    key = (
        *("attention", which, cupy.cuda.runtime.getDevice(), dtype_name(q), scale),
        *((name, x.shape, x.strides, x.data.ptr % 16) for name, x in arrays.items()),
    )

    def described() -> Description:
        B, Q, H, D = q.shape
        K, G = arrays["k"].shape[1:3]
        views = {
            name: View.of(x.data.ptr, x.shape, tuple(step // x.itemsize for step in x.strides))
            for name, x in arrays.items()
        }
        return SequenceShape(B, Q, K, H, G, D), dtype_name(q), views

    found = prepared(key, one, described, scale, ATTENTION)
    scratch = [cupy.empty(shape, cupy.float32) for shape in found.scratch.values()]
    pointers = [x.data.ptr for x in (*arrays.values(), *scratch)]
    found.launch(pointers, cupy.cuda.get_current_stream().ptr)
