"""The CUDA kernels run on the processor, as an implementation: where no GPU is at hand.

The source is the GPU's and so are the choice of variant, the order of launches and the packing of
arguments; what is emulated is the device (:mod:`isoform.kernels.emulate`). Results come from every
order in which threads can take turns, and must be the same bit by bit in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from isoform.conformance.dtypes import Array
from isoform.conformance.implementation import Implementation
from isoform.kernels import plain
from isoform.kernels.arguments import SCRATCH, View, pack
from isoform.kernels.emulate import ORDERS, KernelFault, Order, build
from isoform.reference.contract import DIFFERENTIABLE, Call, Shape, evoformer_call
from isoform.reference.numpy.evoformer import Gradients, check_cotangent, resolve_scale

NAME = "cuda-emulated"
CAPABILITIES = replace(plain.CAPABILITIES, devices=frozenset({"cpu"}))


def evoformer_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    mask_bias: Array | None = None,
    pair_bias: Array | None = None,
    gate: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """:func:`isoform.kernels.evoformer_attention` for NumPy arrays, emulated.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: An operand's shape or the scale is wrong.
        Unsupported: The kernels do not do this call.
        isoform.kernels.emulate.HostCompilerUnavailable: There is no C++ compiler.
        isoform.kernels.emulate.KernelFault: A kernel did what CUDA leaves undefined, or its result
            depends on the order of threads.
    """
    optional = _optional(mask, mask_bias, pair_bias, gate)
    call = evoformer_call(q, k, v, **optional, scale=scale, lse=return_lse)
    CAPABILITIES.require(call, NAME)

    def allocate() -> dict[str, Array]:
        results = {"out": _unwritten(q.shape, q.dtype)}
        if return_lse:
            results["lse"] = _unwritten(call.shape.of("lse"), np.float32)
        return results

    results = _in_every_order(
        plain.forward_launches(call.shape),
        call,
        _present(q, k, v, optional),
        float(resolve_scale(scale, q)),
        allocate,
    )
    return (results["out"], results["lse"]) if return_lse else results["out"]


def evoformer_attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    mask_bias: Array | None = None,
    pair_bias: Array | None = None,
    gate: Array | None = None,
    scale: float | None = None,
) -> Gradients:
    """:func:`isoform.kernels.evoformer_attention_backward` for NumPy arrays, emulated.

    Raises:
        TypeError, ValueError, Unsupported: As in the forward, or dout does not fit the output.
        isoform.kernels.emulate.HostCompilerUnavailable, isoform.kernels.emulate.KernelFault: As in
            the forward.
    """
    optional = _optional(mask, mask_bias, pair_bias, gate)
    call = evoformer_call(q, k, v, **optional, scale=scale)
    check_cotangent(dout, q)
    CAPABILITIES.require(call, NAME)
    operands = _present(q, k, v, optional)
    wanted = [name for name in DIFFERENTIABLE if name in operands]

    def allocate() -> dict[str, Array]:
        gradients = {f"d{name}": _unwritten(operands[name].shape, q.dtype) for name in wanted}
        scratch = {name: _unwritten(call.shape.of("lse"), np.float32) for name in SCRATCH}
        return gradients | scratch

    results = _in_every_order(
        plain.backward_launches(call.shape, wanted),
        call,
        {**operands, "dout": dout},
        float(resolve_scale(scale, q)),
        allocate,
    )
    return Gradients(
        dq=results["dq"],
        dk=results["dk"],
        dv=results["dv"],
        dmask_bias=results.get("dmask_bias"),
        dpair_bias=results.get("dpair_bias"),
        dgate=results.get("dgate"),
    )


CUDA_EMULATED = Implementation(
    name=NAME,
    framework="numpy",
    capabilities=CAPABILITIES,
    forward=evoformer_attention,
    backward=evoformer_attention_backward,
)


def _in_every_order(
    launches: list[plain.Launch],
    call: Call,
    operands: Mapping[str, Array],
    scale: float,
    allocate: Callable[[], dict[str, Array]],
) -> dict[str, Array]:
    """What the launches write, in memory made anew for each order."""
    program = build(plain.SOURCE, defines=plain.defines(call.dtype, call.shape.D))
    threads = (plain.tile(call.shape.D),) * 2

    def run(order: Order) -> dict[str, Array]:
        results = allocate()
        arguments = _packed(call.shape, {**operands, **results}, scale)
        for launch in launches:
            grid = (launch.blocks,)
            program.launch(
                launch.kernel, grid=grid, block=threads, arguments=arguments, order=order
            )
        return results

    first, *others = (run(order) for order in ORDERS)
    for order, results in zip(ORDERS[1:], others, strict=True):
        differing = [name for name, x in first.items() if x.tobytes() != results[name].tobytes()]
        if differing:
            raise KernelFault(
                f"{', '.join(differing)} differ between threads in {ORDERS[0]} order and in "
                f"{order}: a barrier is missing, or two threads write to one place"
            )
    return first


def _packed(shape: Shape, arrays: Mapping[str, Array], scale: float) -> bytes:
    """The bytes of the kernels' argument structure."""
    views = {
        name: View(x.ctypes.data, tuple(stride // x.itemsize for stride in x.strides))
        for name, x in arrays.items()
    }
    return pack(shape, views, scale).tobytes()


def _unwritten(shape: tuple[int, ...], dtype: Any) -> Array:
    """Memory for a result; what is not written to it is seen as NaN."""
    return np.full(shape, np.nan, dtype)


def _optional(mask: Any, mask_bias: Any, pair_bias: Any, gate: Any) -> dict[str, Any]:
    return {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}


def _present(q: Array, k: Array, v: Array, optional: Mapping[str, Any]) -> dict[str, Array]:
    return {"q": q, "k": k, "v": v} | {name: x for name, x in optional.items() if x is not None}
