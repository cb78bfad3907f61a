"""The kernels of attention over a sequence run on the processor, as an implementation.

As :mod:`~isoform.conformance.implementations.emulated` says of Evoformer attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from isoform.conformance.dtypes import Array
from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.emulation import Made, results_of
from isoform.kernels import attention_plain, attention_tensor
from isoform.kernels.attention_arguments import ATTENTION, Options
from isoform.kernels.attention_choice import Kernel, Wish, select, without_idle_places
from isoform.reference.attention_contract import DIFFERENTIABLE, PLACES, attention_call
from isoform.reference.contract import Call
from isoform.reference.numpy.attention import AttentionGradients
from isoform.reference.numpy.evoformer import check_cotangent, resolve_scale

NAME = "cuda-emulated"
PLAIN = replace(attention_plain.CAPABILITIES, devices=frozenset({"cpu"}))
CAPABILITIES = replace(PLAIN, arithmetic=attention_tensor.CAPABILITIES.arithmetic)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    positions: Array | None = None,
    key_positions: Array | None = None,
    segments: Array | None = None,
    key_segments: Array | None = None,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    kernel: str | None = None,
) -> Any:
    """:func:`isoform.kernels.attention` for NumPy arrays, emulated.

    Raises:
        TypeError, ValueError: The call is wrong.
        Unsupported: The kernels do not do this call.
        isoform.kernels.emulate.HostCompilerUnavailable: There is no C++ compiler.
        isoform.kernels.emulate.KernelFault: A kernel did what CUDA leaves undefined, or its result
            depends on the order of threads.
    """
    places = dict(zip(PLACES, (positions, key_positions, segments, key_segments), strict=True))
    call, options = _checked(q, k, v, causal, window, scale, places, lse=return_lse)
    factor = float(resolve_scale(scale, q))
    made: Made = {"out": (q.shape, q.dtype)}
    if return_lse:
        made["lse"] = call.shape.of("lse"), np.dtype(np.float32)
    passes = [_kernel(call, factor, kernel).forward_of(options)]
    arrays = _arrays(call, q, k, v, places)
    results = results_of(passes, call, arrays, factor, made, ATTENTION)
    return (results["out"], results["lse"]) if return_lse else results["out"]


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    positions: Array | None = None,
    key_positions: Array | None = None,
    segments: Array | None = None,
    key_segments: Array | None = None,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    kernel: str | None = None,
) -> AttentionGradients:
    """:func:`isoform.kernels.attention_backward` for NumPy arrays, emulated.

    Raises:
        TypeError, ValueError, Unsupported: As in the forward, or dout does not fit the output.
        isoform.kernels.emulate.HostCompilerUnavailable, isoform.kernels.emulate.KernelFault: As in
            the forward.
    """
    places = dict(zip(PLACES, (positions, key_positions, segments, key_segments), strict=True))
    call, options = _checked(q, k, v, causal, window, scale, places)
    check_cotangent(dout, q)
    factor = float(resolve_scale(scale, q))
    chosen = _kernel(call, factor, kernel)
    statistic = call.shape.of("lse"), np.dtype(np.float32)
    made: Made = {"out": (q.shape, q.dtype), "lse": statistic, "delta": statistic}
    arrays = _arrays(call, q, k, v, places)
    made |= {f"d{name}": (arrays[name].shape, q.dtype) for name in DIFFERENTIABLE}
    passes = [chosen.forward_of(options), chosen.backward_of(options, DIFFERENTIABLE)]
    results = results_of(passes, call, {**arrays, "dout": dout}, factor, made, ATTENTION)
    return AttentionGradients(*(results[f"d{name}"] for name in DIFFERENTIABLE))


CUDA_EMULATED_ATTENTION = Implementation(NAME, "numpy", CAPABILITIES, attention, attention_backward)
CUDA_PLAIN_EMULATED_ATTENTION = Implementation(
    "cuda-plain-emulated",
    "numpy",
    PLAIN,
    partial(attention, kernel="cuda-plain"),
    partial(attention_backward, kernel="cuda-plain"),
)


def _checked(
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: Any,
    scale: float | None,
    places: Mapping[str, Array | None],
    *,
    lse: bool = False,
) -> tuple[Call, Options]:
    given: dict[str, Any] = {"causal": causal, "window": window, "scale": scale, **places}
    call = attention_call(q, k, v, **given, lse=lse)
    CAPABILITIES.require(call, NAME)
    options = Options.of(causal=causal, window=window)
    return without_idle_places(call, options), options


def _kernel(call: Call, scale: float, only: str | None) -> Kernel:
    """The kernel that would run on a GPU which has all instructions that are emulated, for arrays
    that are no tensors of PyTorch's.
    """
    on_a_gpu = replace(call, device="cuda", architecture="sm_80")
    return select(on_a_gpu, Wish(torch=False, scale=scale), only)


def _arrays(
    call: Call, q: Array, k: Array, v: Array, places: Mapping[str, Array | None]
) -> dict[str, Array]:
    """The operands that kernels are given, positions and segments as int64 ``[B, L]``."""
    found = {"q": q, "k": k, "v": v}
    for queries, keys in (("positions", "key_positions"), ("segments", "key_segments")):
        if queries not in call.operands:
            continue
        own = places[queries]
        for name, x in ((queries, own), (keys, own if places[keys] is None else places[keys])):
            assert x is not None
            found[name] = np.broadcast_to(x, call.shape.of(name)).astype(np.int64)
    return found
