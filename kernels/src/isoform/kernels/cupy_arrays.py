"""The kernels for CuPy's arrays: results allocated by CuPy, on its current stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cupy

from isoform.kernels import plain
from isoform.kernels.arguments import SCRATCH, View
from isoform.reference.contract import DIFFERENTIABLE, Call


def forward(
    call: Call, operands: Mapping[str, Any], scale: float, *, return_lse: bool
) -> tuple[Any, Any]:
    """``out``, and ``lse`` or None."""
    q = operands["q"]
    with cupy.cuda.Device(q.device.id):
        results = {"out": cupy.empty(q.shape, q.dtype)}
        if return_lse:
            results["lse"] = cupy.empty(call.shape.of("lse"), cupy.float32)
        plain.launch(
            plain.forward_launches(call.shape),
            call.shape,
            call.dtype,
            _views({**operands, **results}),
            scale,
        )
    return results["out"], results.get("lse")


def backward(
    call: Call, dout: Any, operands: Mapping[str, Any], scale: float
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """The gradients of all operands that are there, in the order of the contract."""
    wanted = [name for name in DIFFERENTIABLE if name in operands]
    with cupy.cuda.Device(dout.device.id):
        gradients = {f"d{name}": cupy.empty(operands[name].shape, dout.dtype) for name in wanted}
        scratch = {name: cupy.empty(call.shape.of("lse"), cupy.float32) for name in SCRATCH}
        plain.launch(
            plain.backward_launches(call.shape, wanted),
            call.shape,
            call.dtype,
            _views({**operands, "dout": dout, **gradients, **scratch}),
            scale,
        )
    dq, dk, dv, *rest = (gradients.get(f"d{name}") for name in DIFFERENTIABLE)
    return dq, dk, dv, rest[0], rest[1], rest[2]


def _views(arrays: Mapping[str, Any]) -> dict[str, View]:
    return {
        name: View(x.data.ptr, tuple(stride // x.itemsize for stride in x.strides))
        for name, x in arrays.items()
    }
