"""The kernels for CuPy's arrays: results allocated by CuPy, on its current stream."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import cupy

from isoform.kernels.arguments import EVOFORMER, Struct, View
from isoform.kernels.choice import Kernel
from isoform.kernels.launch import Description, Pass, prepared
from isoform.reference.contract import DIFFERENTIABLE, Call, dtype_name


def forward(
    kernel: Kernel, call: Call, operands: Mapping[str, Any], scale: float, *, return_lse: bool
) -> tuple[Any, Any]:
    """``out``, and ``lse`` or None."""
    q = operands["q"]
    with cupy.cuda.Device(q.device.id):
        results = {"out": cupy.empty(q.shape, q.dtype)}
        if return_lse:
            results["lse"] = _empty(call.shape.of("lse"))
        _run(kernel.forward, kernel.name, call, {**operands, **results}, scale)
    return results["out"], results.get("lse")


def backward(
    kernel: Kernel, call: Call, dout: Any, operands: Mapping[str, Any], scale: float
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """The gradients of all operands that are there, in the order of the contract."""
    wanted = [name for name in DIFFERENTIABLE if name in operands]
    with cupy.cuda.Device(dout.device.id):
        saved: dict[str, Any] = {}
        if kernel.saved:  # there is no autograd to have kept them
            saved = {
                name: cupy.empty(call.shape.of("lse"), f"u{size}")
                for name, size in kernel.saved.items()
            }
            saved["out"] = cupy.empty(dout.shape, dout.dtype)
            _run(kernel.forward, kernel.name, call, {**operands, **saved}, scale)
        gradients = {f"d{name}": cupy.empty(operands[name].shape, dout.dtype) for name in wanted}
        arrays = {**operands, **saved, "dout": dout, **gradients}
        _run(kernel.backward_of(wanted), (kernel.name, *wanted), call, arrays, scale)
    dq, dk, dv, *rest = (gradients.get(f"d{name}") for name in DIFFERENTIABLE)
    return dq, dk, dv, rest[0], rest[1], rest[2]


def _run(one: Pass, which: Hashable, call: Call, arrays: Mapping[str, Any], scale: float) -> None:
    run(one, which, lambda: call.shape, arrays, scale, EVOFORMER)


def run(
    one: Pass,
    which: Hashable,
    shape: Callable[[], Any],
    arrays: Mapping[str, Any],
    scale: float,
    struct: Struct,
) -> None:
    """Launch a pass of any operation on CuPy's current device and stream: as
    :func:`isoform.kernels.torch_library.run`.
    """
    dtype = dtype_name(arrays["q"])
    key = (
        *(which, cupy.cuda.runtime.getDevice(), dtype, scale),
        *((name, x.shape, x.strides, x.data.ptr % 16) for name, x in arrays.items()),
    )

    def described() -> Description:
        views = {name: View.of(x.data.ptr, x.shape, strides(x)) for name, x in arrays.items()}
        return shape(), dtype, views

    found = prepared(key, one, described, scale, struct)
    scratch = [_empty(size) for size in found.scratch.values()]
    pointers = [x.data.ptr for x in (*arrays.values(), *scratch)]
    found.launch(pointers, cupy.cuda.get_current_stream().ptr)


def strides(x: Any) -> tuple[int, ...]:
    """From one element to the next along each axis, in elements."""
    return tuple(step // x.itemsize for step in x.strides)


def _empty(shape: tuple[int, ...]) -> Any:
    return cupy.empty(shape, cupy.float32)
