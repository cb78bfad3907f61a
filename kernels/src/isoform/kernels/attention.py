"""Attention over a sequence on an NVIDIA GPU: the front door.

The functions, their arguments and their results are those of the reference, for PyTorch's CUDA
tensors (differentiable, and under ``torch.compile``) and for CuPy's arrays (PyTorch is not
imported). Which kernel runs is no secret: :func:`explain_attention` says it, and why the others
decline.

No mask is ever made. Tiles in which no pair attends are passed over, so that causal attention costs
half, and a window what it is wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from isoform.kernels.attention_arguments import Options
from isoform.kernels.attention_choice import (
    Kernel,
    Wish,
    order_of,
    reasons,
    select,
    without_idle_places,
)
from isoform.kernels.libraries import is_torch, whereabouts
from isoform.reference.attention_contract import PLACES, attention_call
from isoform.reference.contract import Call, dtype_name

Window = int | tuple[int, int] | None


class AttentionGradients(NamedTuple):
    """The gradients of q, k and v, in their shapes."""

    dq: Any
    dk: Any
    dv: Any


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    positions: Any = None,
    key_positions: Any = None,
    segments: Any = None,
    key_segments: Any = None,
    window: Window = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    low_memory: bool = False,
    kernel: str | None = None,
) -> Any:
    """Attention over a sequence: causal or full, packed, windowed, in any order.

    Args:
        q: Queries ``[B, Q, H, D]``, float32, float16 or bfloat16, on a GPU: a PyTorch tensor or a
            CuPy array, as all other operands. Any strides.
        k: Keys ``[B, K, G, D]``; G divides H.
        v: Values ``[B, K, G, D]``.
        causal: A query attends to no key after its own position.
        positions: int32 or int64 ``[Q]`` or ``[B, Q]``, in any order; 0 … Q−1 by default.
        key_positions: ``[K]`` or ``[B, K]``; by default those of the queries.
        segments: int32 or int64 ``[Q]`` or ``[B, Q]``: attention stays within a segment, and a
            negative one is padding. One for all by default.
        key_segments: ``[K]`` or ``[B, K]``; by default those of the queries.
        window: ``(left, right)``: how many positions before and after its own a query looks, −1
            for no end; a number stands for both sides.
        scale: Factor of the logits; ``D**-0.5`` by default.
        return_lse: Return the log-sum-exp of the logits too.
        deterministic: Use only kernels that give equal bits for equal calls, gradients included.
        low_memory: Use only kernels that need no memory but for results, lse and δ; libraries' want
            half as much again for the sum of ``dq``.
        kernel: The name of the kernel to use; by default the first that does not decline, as
            :func:`explain_attention` lists them.

    Returns:
        ``out [B, Q, H, D]`` in q's dtype, and with ``return_lse`` also ``lse [B, H, Q]``, float32,
        natural logarithm, without a gradient.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: A shape, a device, the scale or the window is wrong; key_positions or
            key_segments are left out where Q is not K and they matter; or no kernel has the name.
        Unsupported: No kernel does this call; the reasons are all of them.
        isoform.kernels.compiler.CompilerUnavailable: Kernels cannot be compiled on this machine.

    Source:
        arXiv 2205.14135; docs/spec/attention.md.
    """
    asked = _ask(
        *(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale),
        lse=return_lse,
    )
    chosen = asked.kernel(kernel, deterministic=deterministic, low_memory=low_memory)
    out, lse = _door(q).forward(
        chosen, asked.operands, asked.options, asked.scale, return_lse=return_lse
    )
    return (out, lse) if return_lse else out


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    positions: Any = None,
    key_positions: Any = None,
    segments: Any = None,
    key_segments: Any = None,
    window: Window = None,
    scale: float | None = None,
    deterministic: bool = False,
    low_memory: bool = False,
    kernel: str | None = None,
) -> tuple[Any, Callable[[Any], AttentionGradients]]:
    """:func:`attention`, and the function that takes its gradient back (a vector-Jacobian product).

    For who puts a backward together by hand: nothing is recorded for autograd.

    Args:
        q, k, v: As in :func:`attention`.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`.
        scale, deterministic, low_memory, kernel: As in :func:`attention`.

    Returns:
        ``out``, and a function of ``dout`` (the gradient of the loss by ``out``, in its shape and
        dtype) that gives ``dq, dk, dv``, and may be called several times.

    Raises:
        As :func:`attention`; the function: TypeError or ValueError where dout does not fit out.
    """
    asked = _ask(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    chosen = asked.kernel(kernel, deterministic=deterministic, low_memory=low_memory)
    out, lse = _explicit(asked, chosen)

    def take_back(dout: Any) -> AttentionGradients:
        _check_like("dout", dout, dtype_name(q), q.shape, q)
        return _gradients(asked, chosen, dout=dout, out=out, lse=lse)

    return out, take_back


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    positions: Any = None,
    key_positions: Any = None,
    segments: Any = None,
    key_segments: Any = None,
    window: Window = None,
    scale: float | None = None,
    deterministic: bool = False,
    low_memory: bool = False,
    kernel: str | None = None,
) -> AttentionGradients:
    """The gradients of :func:`attention`, given that of its output; it runs the forward, too.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, Q, H, D]``.
        q, k, v: As in :func:`attention`.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`.
        scale, deterministic, low_memory, kernel: As in :func:`attention`.

    Returns:
        ``dq, dk, dv``, each in the shape and dtype of its operand.

    Raises:
        TypeError: As :func:`attention`, or dout is not in q's dtype.
        ValueError: As :func:`attention`, or dout is not in the shape of the output.
        Unsupported: As :func:`attention`.
    """
    asked = _ask(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    _check_like("dout", dout, dtype_name(q), q.shape, q)
    chosen = asked.kernel(kernel, deterministic=deterministic, low_memory=low_memory)
    out, lse = _explicit(asked, chosen)
    return _gradients(asked, chosen, dout=dout, out=out, lse=lse)


def attention_saved_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    causal: bool = False,
    positions: Any = None,
    key_positions: Any = None,
    segments: Any = None,
    key_segments: Any = None,
    window: Window = None,
    scale: float | None = None,
    deterministic: bool = False,
    low_memory: bool = False,
    kernel: str | None = None,
) -> AttentionGradients:
    """The gradients of :func:`attention` whose output and lse are at hand.

    They may be the output and lse over more keys than these, as of a part in
    :mod:`isoform.parallel.in_parts`: then ``dq`` is what these keys give to it, and what all keys
    give is summed. As :func:`attention_block_backward`, but in q's dtype, as libraries have it.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, Q, H, D]``, in q's dtype.
        q: Queries ``[B, Q, H, D]``.
        k: Keys ``[B, K, G, D]``.
        v: Values ``[B, K, G, D]``.
        out: Of the forward, ``[B, Q, H, D]``, in q's dtype.
        lse: Of the forward, float32 ``[B, H, Q]``.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`.
        scale, deterministic, low_memory, kernel: As in :func:`attention`.

    Returns:
        ``dq, dk, dv``, each in the shape and dtype of its operand.

    Raises:
        TypeError: As :func:`attention_backward`, or out is not in q's dtype or lse not float32.
        ValueError: As :func:`attention_backward`, or lse is not ``[B, H, Q]``.
        Unsupported: As :func:`attention`.
    """
    asked = _ask(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    for name, x in (("dout", dout), ("out", out)):
        _check_like(name, x, dtype_name(q), q.shape, q)
    _check_like("lse", lse, "float32", asked.call.shape.of("lse"), q)
    chosen = asked.kernel(kernel, deterministic=deterministic, low_memory=low_memory)
    return _gradients(asked, chosen, dout=dout, out=out, lse=lse)


def attention_block(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    positions: Any = None,
    key_positions: Any = None,
    segments: Any = None,
    key_segments: Any = None,
    window: Window = None,
    scale: float | None = None,
    kernel: str | None = None,
) -> tuple[Any, Any]:
    """:func:`attention` to one block of the keys, to be merged with that to others.

    Args:
        q: Queries ``[B, Q, H, D]``.
        k: The block's keys ``[B, K, G, D]``.
        v: The block's values ``[B, K, G, D]``.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`;
            those of the keys are the block's.
        scale, kernel: As in :func:`attention`.

    Returns:
        ``out [B, Q, H, D]`` and ``lse [B, H, Q]``, both float32, without a gradient
        (:func:`attention_block_backward` computes it): rounded to q's dtype only once all blocks
        are merged.

    Raises:
        TypeError, ValueError, Unsupported: As :func:`attention`.

    Source:
        arXiv 2310.01889, section 3; rule SEQ-11.
    """
    asked = _ask(
        *(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale),
        lse=True,
        wide=True,
    )
    out, lse = _explicit(asked, asked.kernel(kernel))
    return out, lse


def attention_block_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    lse: Any,
    delta: Any,
    *,
    causal: bool = False,
    positions: Any = None,
    key_positions: Any = None,
    segments: Any = None,
    key_segments: Any = None,
    window: Window = None,
    scale: float | None = None,
    kernel: str | None = None,
) -> AttentionGradients:
    """The gradients that one block of the keys gives and gets, when the whole's lse is known.

    Summed over the blocks, ``dq`` is that of the whole; ``dk`` and ``dv`` are the block's own.

    Args:
        dout: Gradient of the loss by the whole's ``out``, ``[B, Q, H, D]``, in q's dtype.
        q: Queries ``[B, Q, H, D]``.
        k: The block's keys ``[B, K, G, D]``.
        v: The block's values ``[B, K, G, D]``.
        lse: float32 ``[B, H, Q]``, log-sum-exp over *all* keys; −inf for queries without any.
        delta: float32 ``[B, H, Q]``, ``Σ_d dout_id out_id`` of the whole's output.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`;
            those of the keys are the block's.
        scale, kernel: As in :func:`attention`.

    Returns:
        ``dq, dk, dv`` in the shapes of q, k and v, float32: rounded to q's dtype only once all
        blocks are summed.

    Raises:
        TypeError: As :func:`attention_backward`, or lse or delta is not float32.
        ValueError: As :func:`attention_backward`, or lse or delta is not ``[B, H, Q]``.
        Unsupported: As :func:`attention`.

    Source:
        arXiv 2310.01889, section 3; rules SEQ-8 and SEQ-11.
    """
    asked = _ask(
        *(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale),
        wide=True,
    )
    _check_like("dout", dout, dtype_name(q), q.shape, q)
    for name, x in (("lse", lse), ("delta", delta)):
        _check_like(name, x, "float32", asked.call.shape.of("lse"), q)
    chosen = asked.kernel(kernel)
    return _gradients(asked, chosen, dout=dout, lse=lse, delta=delta)


def explain_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    positions: Any = None,
    key_positions: Any = None,
    segments: Any = None,
    key_segments: Any = None,
    window: Window = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    low_memory: bool = False,
) -> dict[str, tuple[str, ...]]:
    """Which kernel :func:`attention` would run for this call, and why others decline.

    Args:
        q, k, v: As in :func:`attention`.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`.
        scale, return_lse, deterministic, low_memory: As in :func:`attention`.

    Returns:
        By the name of each kernel, in the order in which they are asked for this call, every reason
        why it declines. The first that has none runs.

    Raises:
        TypeError, ValueError: The call is wrong.
    """
    asked = _ask(
        *(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale),
        lse=return_lse,
    )
    wish = asked.wish(deterministic=deterministic, low_memory=low_memory)
    return {one.name: reasons(one, asked.call, wish) for one in order_of(asked.call)}


class _Asked(NamedTuple):
    """A call that has been checked.

    Attributes:
        call: What it asks for.
        operands: By name, those that kernels are given, defaults filled in.
        options: What it asks for besides.
        scale: The factor of the logits.
    """

    call: Call
    operands: dict[str, Any]
    options: Options
    scale: float

    def wish(self, *, deterministic: bool = False, low_memory: bool = False) -> Wish:
        """What a kernel must fit besides."""
        of_torch, wide = is_torch(self.operands["q"]), self.options.wide
        return Wish(of_torch, self.scale, wide, deterministic, low_memory)

    def kernel(
        self, only: str | None, *, deterministic: bool = False, low_memory: bool = False
    ) -> Kernel:
        """The kernel that does it, or the one called ``only``, as :func:`select` says."""
        wish = self.wish(deterministic=deterministic, low_memory=low_memory)
        return select(self.call, wish, only)


def _ask(
    q: Any,
    k: Any,
    v: Any,
    causal: bool,
    positions: Any,
    key_positions: Any,
    segments: Any,
    key_segments: Any,
    window: Window,
    scale: float | None,
    *,
    lse: bool = False,
    wide: bool = False,
) -> _Asked:
    """The call, once it is found right; defaults filled in (rules SEQ-1 and SEQ-2)."""
    device, architecture = whereabouts(q)
    call = attention_call(
        q,
        k,
        v,
        causal=causal,
        positions=positions,
        key_positions=key_positions,
        segments=segments,
        key_segments=key_segments,
        window=window,
        scale=scale,
        lse=lse,
        device=device,
        architecture=architecture,
    )
    options = Options.of(causal=causal, window=window, wide=wide)
    call = without_idle_places(call, options)
    named = dict(zip(PLACES, (positions, key_positions, segments, key_segments), strict=True))
    operands = {"q": q, "k": k, "v": v}
    for queries, keys in (("positions", "key_positions"), ("segments", "key_segments")):
        if queries in call.operands:
            operands[queries] = named[queries]
            operands[keys] = named[queries] if named[keys] is None else named[keys]
    factor = call.shape.D**-0.5 if scale is None else float(scale)
    return _Asked(call, operands, options, factor)


def _explicit(asked: _Asked, kernel: Kernel) -> tuple[Any, Any]:
    """``out`` and ``lse``, nothing recorded for autograd."""
    operands = {name: _detached(x) for name, x in asked.operands.items()}
    door = _door(asked.operands["q"])
    out, lse = door.forward(kernel, operands, asked.options, asked.scale, return_lse=True)
    return out, lse


def _gradients(asked: _Asked, kernel: Kernel, **more: Any) -> AttentionGradients:
    """The gradients, by ``dout``, ``lse`` and either ``out`` or ``delta``."""
    arrays = {name: _detached(x) for name, x in (asked.operands | more).items()}
    door = _door(asked.operands["q"])
    return AttentionGradients(*door.backward(kernel, arrays, asked.options, asked.scale))


def _detached(x: Any) -> Any:
    return x.detach() if is_torch(x) else x


def _door(q: Any) -> Any:
    """The module that runs kernels on arrays of the library of ``q``."""
    if is_torch(q):
        from isoform.kernels import attention_torch

        return attention_torch
    from isoform.kernels import attention_cupy

    return attention_cupy


def _check_like(name: str, x: Any, dtype: str, shape: tuple[int, ...], q: Any) -> None:
    """Raise unless ``x`` has this dtype and shape and is where ``q`` is."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    if dtype_name(x) != dtype:
        raise TypeError(f"{name} must be {dtype}, got {dtype_name(x)}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if str(getattr(x, "device", "cpu")) != str(getattr(q, "device", "cpu")):
        raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")
