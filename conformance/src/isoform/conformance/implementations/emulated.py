"""The CUDA kernels run on the processor, as an implementation: where no GPU is at hand.

The source is the GPU's and so are the choice of variant, the order of launches and the packing of
arguments; what is emulated is the device (:mod:`isoform.kernels.emulate`). Results come from every
order in which threads can take turns, and must be the same bit by bit in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from isoform.conformance.dtypes import Array
from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations import cuda
from isoform.conformance.implementations.emulated_attention import CUDA_EMULATED_ATTENTION
from isoform.conformance.implementations.emulated_rotary import CUDA_EMULATED_ROTARY
from isoform.conformance.implementations.emulation import Made, results_of
from isoform.kernels import tensor, warpgroup
from isoform.kernels.arguments import EVOFORMER
from isoform.kernels.choice import Kernel, select
from isoform.kernels.launch import setting
from isoform.reference.contract import DIFFERENTIABLE, Call, evoformer_call
from isoform.reference.numpy.evoformer import Gradients, check_cotangent, resolve_scale

NAME = "cuda-emulated"
CAPABILITIES = replace(cuda.CAPABILITIES, devices=frozenset({"cpu"}))


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

    factor = float(resolve_scale(scale, q))
    kernel = _kernel(call)
    operands = _present(q, k, v, optional)
    made: Made = {"out": (q.shape, q.dtype)}
    if return_lse:
        made["lse"] = call.shape.of("lse"), np.dtype(np.float32)
    results = results_of([kernel.forward], call, operands, factor, made, EVOFORMER)
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

    factor = float(resolve_scale(scale, q))
    kernel = _kernel(call)
    passes = [kernel.backward_of(wanted)]
    made: Made = {f"d{name}": (operands[name].shape, q.dtype) for name in wanted}
    if kernel.saved:
        passes.insert(0, kernel.forward)
        made["out"] = dout.shape, q.dtype
        made |= {
            name: (call.shape.of("lse"), np.dtype(f"u{size}"))
            for name, size in kernel.saved.items()
        }
    results = results_of(passes, call, {**operands, "dout": dout}, factor, made, EVOFORMER)
    return Gradients(
        dq=results["dq"],
        dk=results["dk"],
        dv=results["dv"],
        dmask_bias=results.get("dmask_bias"),
        dpair_bias=results.get("dpair_bias"),
        dgate=results.get("dgate"),
    )


@contextmanager
def hopper() -> Iterator[None]:
    """While this lasts, calls are launched as on a Hopper, by the kernels that only it has wherever
    those can.
    """
    every = tensor.Special(tensor.WHOLE, tensor.GROUPED, warpgroup.BACKWARD)
    with setting(tensor.SPECIAL, every), tensor.eagerly():
        yield


CUDA_EMULATED = Implementation(
    name=NAME,
    framework="numpy",
    capabilities=CAPABILITIES,
    forward=evoformer_attention,
    backward=evoformer_attention_backward,
    others=(CUDA_EMULATED_ROTARY, CUDA_EMULATED_ATTENTION),
)

CUDA_EMULATED_HOPPER = replace(
    CUDA_EMULATED,
    name="cuda-emulated-hopper",
    forward=hopper()(evoformer_attention),
    backward=hopper()(evoformer_attention_backward),
    others=(),
)


def _kernel(call: Call) -> Kernel:
    """The kernel that would run on a GPU which has all instructions that are emulated."""
    return select(replace(call, device="cuda", architecture="sm_80"))


def _optional(mask: Any, mask_bias: Any, pair_bias: Any, gate: Any) -> dict[str, Any]:
    return {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}


def _present(q: Array, k: Array, v: Array, optional: Mapping[str, Any]) -> dict[str, Array]:
    return {"q": q, "k": k, "v": v} | {name: x for name, x in optional.items() if x is not None}
