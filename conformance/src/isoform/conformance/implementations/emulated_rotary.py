"""The rotary kernel run on the processor, as an implementation: where no GPU is at hand.

As :mod:`~isoform.conformance.implementations.emulated` says of Evoformer attention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from isoform.conformance.dtypes import Array
from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.emulation import in_every_order
from isoform.kernels import rotary_launch
from isoform.kernels.emulate import Order
from isoform.kernels.emulate.calls import launch_told, lying, unwritten
from isoform.kernels.rotary_launch import Turn, told
from isoform.reference.rotary_contract import resolve_rotary_dim, rotary_call
from isoform.reference.rotary_scaling import Scaling

NAME = "cuda-emulated"

CAPABILITIES = replace(rotary_launch.CAPABILITIES, devices=frozenset({"cpu"}))


def rotary_embedding(
    x: Array,
    positions: Array,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Scaling | None = None,
) -> Array:
    """:func:`isoform.kernels.rotary_embedding` for NumPy arrays, emulated.

    Raises:
        TypeError, ValueError: The call is wrong.
        Unsupported: The kernel does not do this call.
        isoform.kernels.emulate.HostCompilerUnavailable: There is no C++ compiler.
        isoform.kernels.emulate.KernelFault: The kernel did what CUDA leaves undefined, or its
            result depends on the order of threads.
    """
    return _checked_and_turned("x", x, positions, base, rotary_dim, layout, scaling)


def rotary_embedding_backward(
    dout: Array,
    positions: Array,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Scaling | None = None,
) -> Array:
    """:func:`isoform.kernels.rotary_embedding_backward` for NumPy arrays, emulated.

    Raises:
        TypeError, ValueError, Unsupported: As in the forward.
        isoform.kernels.emulate.HostCompilerUnavailable, isoform.kernels.emulate.KernelFault: As in
            the forward.
    """
    return _checked_and_turned("dout", dout, positions, base, rotary_dim, layout, scaling)


CUDA_EMULATED_ROTARY = Implementation(
    name=NAME,
    framework="numpy",
    capabilities=CAPABILITIES,
    forward=rotary_embedding,
    backward=rotary_embedding_backward,
)


def _checked_and_turned(
    name: str,
    x: Array,
    positions: Array,
    base: float,
    rotary_dim: int | None,
    layout: str,
    scaling: Scaling | None,
) -> Array:
    how: dict[str, Any] = {"base": base, "rotary_dim": rotary_dim, "layout": layout}
    call = rotary_call(x, positions, **how, scaling=scaling, called=name)
    CAPABILITIES.require(call, NAME)
    d = resolve_rotary_dim(rotary_dim, x.shape[-1])
    turn = Turn(d, float(base), layout, scaling, backwards=name == "dout")
    (out,) = turned(turn, [x], positions)
    return out


def turned(turn: Turn, operands: list[Array], positions: Array) -> list[Array]:
    """One or two arrays, turned by one launch into memory of their own."""
    names = ("x", "other")[: len(operands)]

    def run(order: Order) -> dict[str, Array]:
        given = dict(zip(names, operands, strict=True))
        results = {
            out: unwritten(x.shape, x.dtype)
            for out, x in zip(("out", "out_other"), operands, strict=False)
        }
        arrays = {**given, **results, "positions": positions}
        launch(turn, arrays, order)
        return results

    return list(in_every_order(run).values())


def launch(turn: Turn, arrays: dict[str, Array], order: Order = "forward") -> None:
    """What :func:`isoform.kernels.rotary_launch.launch` does, emulated."""
    launch_told(told(turn, {name: lying(x) for name, x in arrays.items()}), order)
