"""Rotary embedding on an NVIDIA GPU: the front door.

The functions, their arguments and their results are those of the reference, for PyTorch's CUDA
tensors (differentiable as often as need be, and under ``torch.compile``) and for CuPy's arrays
(PyTorch is not imported). Beside them stand those that a model wants for speed: queries and keys in
one launch, and in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isoform.kernels.choice import declined
from isoform.kernels.libraries import is_torch, whereabouts
from isoform.kernels.rotary_launch import CAPABILITIES, Turn
from isoform.reference.contract import Unsupported, dtype_name
from isoform.reference.rotary_contract import resolve_rotary_dim, rotary_call
from isoform.reference.rotary_scaling import Scaling


def rotary_embedding(
    x: Any,
    positions: Any,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Scaling | None = None,
) -> Any:
    """Turn pairs of channels by angles that grow with the position.

    Args:
        x: Queries or keys ``[B, L, H, D]``, float32, float16 or bfloat16, on a GPU: a PyTorch
            tensor or a CuPy array. Any strides: also those of one part of ``qkv [B, L, 3, H, D]``.
        positions: Integers ``[L]``, or ``[B, L]`` where they differ between examples; in any order,
            negative ones too. On the same device. They are not looked at by the host.
        base: Of the frequencies, above 1.
        rotary_dim: How many channels are turned, an even number; None for all D.
        layout: ``"half"`` for pairs (i, i + d/2), ``"interleaved"`` for pairs (2i, 2i + 1).
        scaling: What is done to the frequencies for longer contexts
            (:mod:`isoform.reference.rotary_scaling`).

    Returns:
        ``out [B, L, H, D]`` in x's dtype, contiguous.

    Raises:
        TypeError: An operand's dtype, or the type of another argument, is wrong.
        ValueError: An operand's shape or device, or the value of another argument, is wrong.
        Unsupported: The kernel does not do this call; the reasons are all of them.
        isoform.kernels.compiler.CompilerUnavailable: Kernels cannot be compiled on this machine.

    Source:
        Su et al., arXiv 2104.09864, equation 34; docs/spec/rotary.md.
    """
    turn = _checked({"x": x}, positions, base, rotary_dim, layout, scaling)
    return _turned(turn, x, None, positions)[0]


def rotary_embedding_backward(
    dout: Any,
    positions: Any,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Scaling | None = None,
) -> Any:
    """The gradient of :func:`rotary_embedding` by x: the same kernel, by the opposite angle.

    PyTorch's autograd does it by itself.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, L, H, D]``.
        positions, base, rotary_dim, layout, scaling: As in the forward.

    Returns:
        ``dx [B, L, H, D]`` in dout's dtype.

    Raises:
        TypeError, ValueError, Unsupported: As in the forward.
    """
    turn = _checked({"dout": dout}, positions, base, rotary_dim, layout, scaling, backwards=True)
    return _turned(turn, dout, None, positions)[0]


def rotary_embedding_qk(
    q: Any,
    k: Any,
    positions: Any,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Scaling | None = None,
) -> tuple[Any, Any]:
    """:func:`rotary_embedding` of queries and keys in one launch, which computes angles once.

    Args:
        q: Queries ``[B, L, H, D]``.
        k: Keys ``[B, L, G, D]``, in the dtype of q.
        positions, base, rotary_dim, layout, scaling: As there.

    Returns:
        ``q`` and ``k`` turned, in their own shapes, contiguous.

    Raises:
        TypeError, ValueError, Unsupported: As there; k does not fit q.
    """
    turn = _checked({"q": q, "k": k}, positions, base, rotary_dim, layout, scaling)
    return _turned(turn, q, k, positions)


def rotary_embedding_(
    x: Any,
    positions: Any,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Scaling | None = None,
) -> Any:
    """:func:`rotary_embedding` in place: x is written, channels that pass through are not touched.

    Args:
        x, positions, base, rotary_dim, layout, scaling: As there.

    Returns:
        ``x``.

    Raises:
        TypeError, ValueError, Unsupported: As there. ValueError also where two elements of x lie at
            one place, Unsupported where PyTorch is to compute a gradient of it.
    """
    turn = _checked({"x": x}, positions, base, rotary_dim, layout, scaling)
    _turned_in_place(turn, {"x": x}, positions)
    return x


def rotary_embedding_qk_(
    q: Any,
    k: Any,
    positions: Any,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Scaling | None = None,
) -> tuple[Any, Any]:
    """:func:`rotary_embedding_` of queries and keys in one launch, as of ``qkv[:, :, 0]`` and
    ``qkv[:, :, 1]`` of a projection ``qkv [B, L, 3, H, D]``.

    Args:
        q, k, positions, base, rotary_dim, layout, scaling: As in :func:`rotary_embedding_qk`.

    Returns:
        ``q`` and ``k``.

    Raises:
        TypeError, ValueError, Unsupported: As in :func:`rotary_embedding_qk` and
            :func:`rotary_embedding_`.
    """
    turn = _checked({"q": q, "k": k}, positions, base, rotary_dim, layout, scaling)
    _turned_in_place(turn, {"q": q, "k": k}, positions)
    return q, k


def _checked(
    operands: Mapping[str, Any],
    positions: Any,
    base: float,
    rotary_dim: int | None,
    layout: str,
    scaling: Scaling | None,
    *,
    backwards: bool = False,
) -> Turn:
    """How the call turns its one or two operands; raises what a wrong or a declined call must."""
    (first, x), *others = operands.items()
    device, architecture = whereabouts(x)
    for name, operand in operands.items():
        call = rotary_call(
            operand,
            positions,
            base=base,
            rotary_dim=rotary_dim,
            layout=layout,
            scaling=scaling,
            device=device,
            architecture=architecture,
            called=name,
        )
    for name, operand in others:
        _check_alike(name, operand, first, x)
    if reasons := declined(CAPABILITIES, call):
        raise Unsupported(reasons, "isoform.kernels")
    d = resolve_rotary_dim(rotary_dim, x.shape[-1])
    return Turn(d, float(base), layout, scaling, backwards)


def _check_alike(name: str, operand: Any, first: str, x: Any) -> None:
    """Raise unless ``operand`` differs from ``x`` in its heads alone."""
    if dtype_name(operand) != dtype_name(x):
        raise TypeError(
            f"{name} must be {dtype_name(x)}, the dtype of {first}, got {dtype_name(operand)}"
        )
    for axis, place in (("B", 0), ("L", 1), ("D", 3)):
        if operand.shape[place] != x.shape[place]:
            raise ValueError(
                f"{name} must have {axis}={x.shape[place]} of {first} on axis {place} of "
                f"[B, L, H, D], got shape {tuple(operand.shape)}"
            )


def _turned(turn: Turn, x: Any, other: Any, positions: Any) -> tuple[Any, Any]:
    found: tuple[Any, Any] = _library(x).turned(turn, x, other, positions)
    return found


def _turned_in_place(turn: Turn, operands: Mapping[str, Any], positions: Any) -> None:
    for name, x in operands.items():
        if overlapping(x.shape, _library(x).strides(x)):
            raise ValueError(f"{name} shares memory with itself: it cannot be turned in place")
    x, other = (*operands.values(), None)[:2]
    _library(x).turn_in_place(turn, x, other, positions)


def _library(x: Any) -> Any:
    """The kernel behind the array library of ``x``."""
    if is_torch(x):
        from isoform.kernels import rotary_torch

        return rotary_torch
    from isoform.kernels import rotary_cupy

    return rotary_cupy


def overlapping(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two elements may lie at one place: unless each stride, by size, steps over all that
    the smaller ones reach.
    """
    if 0 in shape:
        return False
    reached = 0
    for stride, size in sorted((abs(t), n) for n, t in zip(shape, strides, strict=True) if n > 1):
        if stride <= reached:
            return True
        reached += stride * (size - 1)
    return False
