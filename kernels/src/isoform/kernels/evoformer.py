"""Evoformer attention on an NVIDIA GPU: the front door.

The function, its arguments and its results are those of the reference, for PyTorch's CUDA tensors
(differentiable, and under ``torch.compile``) and for CuPy's arrays (with an explicit backward;
PyTorch is not imported). Which kernel runs is no secret: :func:`explain` says it, and why others
decline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isoform.kernels.choice import Kernel, order, reasons, select
from isoform.kernels.libraries import is_torch, whereabouts
from isoform.reference.contract import Call, evoformer_call


def evoformer_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    mask_bias: Any = None,
    pair_bias: Any = None,
    gate: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    low_memory: bool = False,
    kernel: str | None = None,
) -> Any:
    """Evoformer attention: softmax attention with a mask bias, a shared pair bias and a gate.

    Args:
        q: Queries ``[B, S, Q, H, D]``, float32, float16 or bfloat16, on a GPU: a PyTorch tensor or
            a CuPy array, as all other operands. Any strides.
        k: Keys ``[B, S, K, G, D]``; G divides H.
        v: Values ``[B, S, K, G, D]``.
        mask: Bool ``[B, S, K]``; True where the key may be attended to.
        mask_bias: ``[B, S, 1, 1, K]``, added to the logits; −inf allowed.
        pair_bias: ``[B, 1, H, Q, K]``, added to the logits of every row; −inf allowed.
        gate: ``[B, S, Q, H, D]``; the output is multiplied by its sigmoid.
        scale: Factor of the logits; ``D**-0.5`` by default.
        return_lse: Return the log-sum-exp of the logits too.
        deterministic: Use only kernels that give equal bits for equal calls, gradients included.
        low_memory: Use only kernels that need no memory but for results, lse, δ and one float32
            ``dpair_bias``. On a Hopper the faster backward takes 4 bytes more for each query and
            head.
        kernel: The name of the kernel to use; by default the first that does not decline, as
            :func:`explain` lists them.

    Returns:
        ``out [B, S, Q, H, D]`` in q's dtype, and with ``return_lse`` also ``lse [B, S, H, Q]``,
        float32, natural logarithm, before the gate, without a gradient.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: An operand's shape, its device or the scale is wrong, or no kernel has the name.
        Unsupported: No kernel does this call; the reasons are all of them.
        isoform.kernels.compiler.CompilerUnavailable: Kernels cannot be compiled on this machine.

    Source:
        arXiv 2205.14135; docs/spec/evoformer.md.
    """
    operands = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}

    def decide() -> tuple[Call, float, Kernel]:
        call = _call(q, k, v, operands, scale, return_lse)
        chosen = select(call, deterministic=deterministic, low_memory=low_memory, only=kernel)
        return call, _factor(call, scale), chosen

    if is_torch(q):
        from isoform.kernels import torch_library, torch_op

        present = (q, k, v, mask, mask_bias, pair_bias, gate)
        asked = ("evoformer_attention", scale, return_lse, deterministic, low_memory, kernel)
        _, factor, chosen = torch_library.decided(decide, present, *asked)
        out, lse = torch_op.forward(chosen, present, factor, return_lse=return_lse)
    else:
        call, factor, chosen = decide()
        from isoform.kernels import cupy_arrays

        arrays = _present(q, k, v, operands)
        out, lse = cupy_arrays.forward(chosen, call, arrays, factor, return_lse=return_lse)
    return (out, lse) if return_lse else out


def evoformer_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    mask_bias: Any = None,
    pair_bias: Any = None,
    gate: Any = None,
    scale: float | None = None,
    deterministic: bool = False,
    low_memory: bool = False,
    kernel: str | None = None,
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """The gradients of :func:`evoformer_attention` for CuPy arrays; PyTorch has autograd.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, S, Q, H, D]``.
        q, k, v, mask, mask_bias, pair_bias, gate, scale, deterministic, low_memory, kernel: As in
            the forward.

    Returns:
        ``dq, dk, dv, dmask_bias, dpair_bias, dgate``, each in the shape and dtype of its operand,
        None where the operand is absent.

    Raises:
        TypeError: As in the forward; dout is not in q's dtype; the operands are tensors of PyTorch.
        ValueError: As in the forward; dout is not in the shape of the output or not on its device.
        Unsupported: As in the forward.
    """
    if is_torch(q):
        raise TypeError("q is a PyTorch tensor: its gradients come from autograd, call backward()")
    operands = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}
    call = _call(q, k, v, operands, scale)
    _check_cotangent(dout, q)
    factor = _factor(call, scale)
    chosen = select(call, deterministic=deterministic, low_memory=low_memory, only=kernel)
    from isoform.kernels import cupy_arrays

    return cupy_arrays.backward(chosen, call, dout, _present(q, k, v, operands), factor)


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    mask_bias: Any = None,
    pair_bias: Any = None,
    gate: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    low_memory: bool = False,
) -> dict[str, tuple[str, ...]]:
    """Which kernel :func:`evoformer_attention` would run for this call, and why others decline.

    Args:
        q, k, v, mask, mask_bias, pair_bias, gate, scale, return_lse, deterministic, low_memory: As
            in :func:`evoformer_attention`.

    Returns:
        By the name of each kernel, every reason why it declines. The first that has none runs.

    Raises:
        TypeError, ValueError: The call is wrong.
    """
    operands = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}
    call = _call(q, k, v, operands, scale, return_lse)
    asked = {"deterministic": deterministic, "low_memory": low_memory}
    return {one.name: reasons(one, call, **asked) for one in order(low_memory=low_memory)}


def _call(
    q: Any, k: Any, v: Any, operands: Mapping[str, Any], scale: float | None, lse: bool = False
) -> Call:
    """What is asked for, once the operands have been checked, and where they lie."""
    device, architecture = whereabouts(q)
    return evoformer_call(
        q, k, v, **operands, scale=scale, lse=lse, device=device, architecture=architecture
    )


def _factor(call: Call, scale: float | None) -> float:
    return call.shape.D**-0.5 if scale is None else float(scale)


def _present(q: Any, k: Any, v: Any, operands: Mapping[str, Any]) -> dict[str, Any]:
    return {"q": q, "k": k, "v": v} | {name: x for name, x in operands.items() if x is not None}


def _check_cotangent(dout: Any, q: Any) -> None:
    """Raise unless ``dout`` has the shape, the dtype and the device of the output."""
    if not (hasattr(dout, "shape") and hasattr(dout, "dtype")):
        raise TypeError(f"dout must be an array, got {type(dout).__name__}")
    if dout.dtype != q.dtype:
        raise TypeError(f"dout must be {q.dtype}, the dtype of q, got {dout.dtype}")
    if dout.shape != q.shape:
        raise ValueError(f"dout must have the shape of q {q.shape}, got {dout.shape}")
    if str(getattr(dout, "device", "cpu")) != str(getattr(q, "device", "cpu")):
        raise ValueError(f"dout is on {dout.device}, but q is on {q.device}")
