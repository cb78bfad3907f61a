"""LayerNorm, bias and GeLU, bias, dropout and residual, and the masked softmax, on an NVIDIA GPU:
the front door.

For PyTorch's CUDA tensors: differentiable once, and under ``torch.compile``. The functions are
those of ``isoform.reference.torch.fused``, and what is dropped is the same, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from isoform.kernels.choice import REMEDIES
from isoform.kernels.layer_norm_launch import MOST_CHANNELS
from isoform.kernels.libraries import is_torch, whereabouts
from isoform.kernels.plain import ELEMENTS
from isoform.reference.contract import Unsupported, dtype_name
from isoform.reference.fused_contract import (
    check_approximate,
    check_epsilon,
    check_operands,
    check_seed,
    check_softmax,
    threshold_of,
)

MOST_SCALE = (2 - 2.0**-23) * 2.0**127
"""The largest number of float32."""


def layer_norm(x: Any, weight: Any, bias: Any, *, epsilon: float = 1e-5) -> Any:
    """LayerNorm over the channels; forward and backward read and write each array once.

    Args:
        x: Activations ``[..., C]``, as in :func:`bias_gelu`, of 8192 channels at most.
        weight, bias: ``[C]``, in x's dtype, on its device.
        epsilon: What is added to the variance, above 0.

    Returns:
        ``out [..., C]`` in x's dtype, contiguous. For the backward, x and two numbers for each
        token are kept.

    Raises:
        TypeError: An operand's dtype, or epsilon's type, is wrong.
        ValueError: An operand's shape or device, or epsilon, is wrong.
        Unsupported: As in :func:`bias_gelu`, or there are more channels.
        isoform.kernels.compiler.CompilerUnavailable: Kernels cannot be compiled on this machine.
    """
    check_operands({"x": x, "weight": weight, "bias": bias})
    check_epsilon(epsilon)
    C = x.shape[-1]
    _require(x, [f"C={C} channels (at most {MOST_CHANNELS})"] if C > MOST_CHANNELS else ())
    from isoform.kernels import fused_torch

    return fused_torch.layer_norm(x, weight, bias, float(epsilon))


def bias_gelu(x: Any, bias: Any, *, approximate: str = "tanh") -> Any:
    """GeLU of ``x + bias``; forward and backward read and write each array once.

    Args:
        x: Activations ``[..., C]``, float32, float16 or bfloat16, a PyTorch tensor on a GPU. Rows
            that lie evenly apart, each contiguous, are read as they lie; what lies otherwise is
            copied first.
        bias: ``[C]``, in x's dtype, on its device.
        approximate: ``"tanh"`` or ``"none"``, as PyTorch's.

    Returns:
        ``out [..., C]`` in x's dtype, contiguous.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: An operand's shape or device, or ``approximate``, is wrong.
        Unsupported: The kernel does not do this call; the reasons are all of them.
        isoform.kernels.compiler.CompilerUnavailable: Kernels cannot be compiled on this machine.
    """
    operands = {"x": x, "bias": bias}
    check_operands(operands)
    check_approximate(approximate)
    _require(x)
    from isoform.kernels import fused_torch

    return fused_torch.bias_gelu(x, bias, approximate == "tanh")


def bias_dropout_residual(
    x: Any,
    bias: Any,
    residual: Any,
    p: float,
    *,
    seed: Any = None,
    generator: Any = None,
) -> Any:
    """``residual + dropout(x + bias)``; forward and backward read and write each array once, and
    nothing is stored of what was dropped.

    Args:
        x: As in :func:`bias_gelu`.
        bias: ``[C]``, in x's dtype, on its device.
        residual: ``[..., C]``, in x's dtype, on its device.
        p: The share that is dropped, rounded to a multiple of 1/65536; 0 where nothing is trained.
        seed: What is dropped is a function of it: an int of 64 bits, or a tensor of one int64 on
            x's device. Without one it is drawn there, by ``generator``; under ``torch.compile`` too
            it is another in each call.
        generator: A generator of x's device; PyTorch's own if there is none.

    Returns:
        ``out [..., C]`` in x's dtype, contiguous. What is dropped is not looked at.

    Raises:
        TypeError: An operand's dtype, or the type of another argument, is wrong.
        ValueError: An operand's shape or device, p or the seed is wrong, or there are both a seed
            and a generator.
        Unsupported: As in :func:`bias_gelu`.
        isoform.kernels.compiler.CompilerUnavailable: Kernels cannot be compiled on this machine.
    """
    operands = {"x": x, "bias": bias, "residual": residual}
    check_operands(operands)
    threshold = threshold_of(p)
    if seed is not None and generator is not None:
        raise ValueError("give a seed or a generator that draws one, not both")
    if isinstance(seed, int):  # first: to look at its class is more than PyTorch 2.11 compiles
        check_seed(seed)
    elif seed is not None:
        _check_seed_tensor(seed, x)
    _require(x)
    from isoform.kernels import fused_torch

    return fused_torch.bias_dropout_residual(x, bias, residual, threshold, seed, generator)


def masked_softmax(
    scores: Any, *, mask: Any = None, causal: bool = False, scale: float = 1.0
) -> Any:
    """Probabilities over the keys, of ``scale * scores``; forward and backward read and write each
    array once, and nothing is read that a causal mask leaves out.

    Rows of up to 4096 keys are read once however they lie, those of up to 16384 where they start on
    16 bytes. Rows that are too long for a block to hold are read twice.

    Args:
        scores: ``[B, H, Q, K]``, float32, float16 or bfloat16, a PyTorch tensor on a GPU. Rows that
            lie evenly apart, each contiguous, are read as they lie; what lies otherwise is copied
            first.
        mask: Bool ``[B or 1, H or 1, Q or 1, K]`` on the device of scores, True where the query may
            attend to the key. What is given once for all is read so, and never expanded.
        causal: Whether query i attends to keys j ≤ i only; Q has to be K.
        scale: A finite real number.

    Returns:
        ``probabilities [B, H, Q, K]`` in the dtype of scores, contiguous; 0 where a query does not
        attend, and throughout where it has no key left, or every ``scale * scores`` is −inf. What
        is not attended to is not looked at, nor is its gradient; where a query attends to NaN, or
        to +inf, its probabilities are NaN. All that is kept for the backward is the result.

    Raises:
        TypeError: An operand's dtype, or the type of another argument, is wrong.
        ValueError: An operand's shape or device or the scale is wrong, or causal is, as Q is not K.
        Unsupported: As in :func:`bias_gelu`, or float32 does not hold the scale.
        isoform.kernels.compiler.CompilerUnavailable: Kernels cannot be compiled on this machine.
    """
    check_softmax(scores, mask, causal, scale)
    scale = float(scale)
    _require(scores, [f"scale {scale} (of float32 only)"] if abs(scale) > MOST_SCALE else ())
    from isoform.kernels import fused_torch

    return fused_torch.masked_softmax(scores, mask, causal, scale)


def _check_seed_tensor(seed: Any, x: Any) -> None:
    if not is_torch(seed):
        check_seed(seed)
    if dtype_name(seed) != "int64":
        raise TypeError(f"seed must be an int, or a tensor of one int64, got {dtype_name(seed)}")
    if seed.numel() != 1:
        raise ValueError(f"seed must be one number, got shape {tuple(seed.shape)}")
    if seed.device != x.device:
        raise ValueError(f"seed is on {seed.device}, but x is on {x.device}")


def _require(x: Any, others: Iterable[str] = ()) -> None:
    """Raise :class:`Unsupported` with every reason why the kernels cannot do this, if there is any.

    Args:
        x: The first operand.
        others: Reasons of the operation's own.
    """
    reasons = [*others]
    device, _ = whereabouts(x)
    if device != "cuda":
        what = f"device {device}"
        reasons.append(f"{what} (cuda only)" + (f": {REMEDIES[what]}" if what in REMEDIES else ""))
    if (dtype := dtype_name(x)) not in ELEMENTS:
        reasons.append(f"dtype {dtype} ({', '.join(sorted(ELEMENTS))} only)")
    if not is_torch(x):
        reasons.append(f"{type(x).__module__}.{type(x).__name__} (tensors of PyTorch's only)")
    if reasons:
        raise Unsupported(reasons, "isoform.kernels")
