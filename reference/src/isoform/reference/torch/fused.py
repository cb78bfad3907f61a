"""LayerNorm, bias and GeLU, bias, dropout and residual, and the masked softmax, in PyTorch:
:mod:`isoform.reference.numpy.fused` once more, differentiable by autograd as often as need be, on
any device.

float16 and bfloat16 operands are lifted to float32, and results rounded once. What is dropped is a
function of the seed, the same as there, bit by bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from isoform.reference.fused_contract import (
    DRAWS,
    INCREMENTS,
    MULTIPLIERS,
    ROUNDS,
    check_approximate,
    check_epsilon,
    check_operands,
    check_seed,
    check_softmax,
    check_softmax_backward,
    threshold_of,
)

LOW = 0xFFFFFFFF


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "tanh") -> Tensor:
    """GeLU of ``x + bias``.

    Args:
        x: Activations ``[..., C]``, any float dtype.
        bias: ``[C]``, in x's dtype.
        approximate: ``"tanh"`` or ``"none"``.

    Returns:
        ``out [..., C]`` in x's dtype.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: An operand's shape or device, or ``approximate``, is wrong.
    """
    check_operands({"x": x, "bias": bias})
    check_approximate(approximate)
    return gelu(_wide(x) + _wide(bias), approximate=approximate).to(x.dtype)


def bias_dropout_residual(
    x: Tensor, bias: Tensor, residual: Tensor, p: float, *, seed: int
) -> Tensor:
    """``residual + dropout(x + bias)``.

    Args:
        x: Activations ``[..., C]``, any float dtype.
        bias: ``[C]``, in x's dtype.
        residual: ``[..., C]``, in x's dtype.
        p: The share that is dropped, rounded to a multiple of 1/65536.
        seed: What is dropped is a function of it.

    Returns:
        ``out [..., C]`` in x's dtype.

    Raises:
        TypeError: An operand's dtype, or the type of another argument, is wrong.
        ValueError: An operand's shape or device, p or the seed is wrong.
    """
    check_operands({"x": x, "bias": bias, "residual": residual})
    threshold = threshold_of(p)
    factor = DRAWS / (DRAWS - threshold) if threshold < DRAWS else 0.0
    kept = draws(x.shape, seed, x.device) >= threshold
    u = _wide(x) + _wide(bias)
    return (_wide(residual) + torch.where(kept, factor * u, 0)).to(x.dtype)


def draws(shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The draw of every element of an array ``[..., C]``, from 0 to 65535."""
    check_seed(seed)
    *tokens, channels = shape
    n = torch.arange(math.prod(tokens), device=device)[:, None]
    j = torch.arange(-(-channels // 8), device=device)[None, :]
    counter = (part.expand(n.numel(), j.numel()) for part in (j, n & LOW, n >> 32, 0 * n))
    words = philox(tuple(counter), seed)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).flatten(1)[:, :channels].reshape(shape)


def philox(counter: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    """Philox 4x32-10 of counters, four tensors of words of 32 bits: four such tensors.

    Words are held by int64, whose product of two is right modulo 2⁶⁴ and has the halves asked for.
    """
    c0, c1, c2, c3 = counter
    keys = [seed >> shift & LOW for shift in (0, 32)]
    for _ in range(ROUNDS):
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> 32 & LOW) ^ c1 ^ keys[0],
            second & LOW,
            (first >> 32 & LOW) ^ c3 ^ keys[1],
            first & LOW,
        )
        keys = [key + more & LOW for key, more in zip(keys, INCREMENTS, strict=True)]
    return [c0, c1, c2, c3]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """LayerNorm over the channels.

    Args:
        x: Activations ``[..., C]``, any float dtype.
        weight, bias: ``[C]``, in x's dtype.
        epsilon: What is added to the variance, above 0.

    Returns:
        ``out [..., C]`` in x's dtype.

    Raises:
        TypeError: An operand's dtype, or epsilon's type, is wrong.
        ValueError: An operand's shape or device, or epsilon, is wrong.
    """
    check_operands({"x": x, "weight": weight, "bias": bias})
    check_epsilon(epsilon)
    wide = _wide(x)
    centred = wide - _over_channels(wide)
    inverse = (_over_channels(centred.square()) + float(epsilon)).rsqrt()
    return (_wide(weight) * (centred * inverse) + _wide(bias)).to(x.dtype)


def masked_softmax(
    scores: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float = 1.0
) -> Tensor:
    """Probabilities over the keys, of ``scale * scores``.

    Args:
        scores: ``[B, H, Q, K]``, any float dtype.
        mask: Bool ``[B or 1, H or 1, Q or 1, K]``, True where the query may attend to the key.
        causal: Whether query i attends to keys j ≤ i only; Q has to be K.
        scale: A finite real number.

    Returns:
        ``probabilities [B, H, Q, K]`` in the dtype of scores; 0 where a query does not attend, and
        throughout where it has no key left.

    Raises:
        TypeError: An operand's dtype, or the type of another argument, is wrong.
        ValueError: An operand's shape or device or the scale is wrong, or causal is, as Q is not K.
    """
    check_softmax(scores, mask, causal, scale)
    attended = scores.new_ones((1, 1, 1, 1), dtype=torch.bool) if mask is None else mask
    if causal:
        attended = attended & attended.new_ones(scores.shape[2:]).tril()
    applied = _MaskedSoftmax.apply(scores, attended, float(scale))  # type: ignore[no-untyped-call]
    found: Tensor = applied
    return found


def masked_softmax_backward(dout: Tensor, probabilities: Tensor, *, scale: float = 1.0) -> Tensor:
    """Gradient of :func:`masked_softmax` by the scores, given that of its output.

    Args:
        dout: Gradient of the loss by ``probabilities``, ``[B, H, Q, K]``.
        probabilities: What the forward returned.
        scale: As in the forward.

    Returns:
        ``dscores [B, H, Q, K]``; exactly 0 where a probability is, whatever ``dout`` holds there.

    Raises:
        TypeError, ValueError: As in the forward.
    """
    check_softmax_backward(dout, probabilities, scale)
    p = _wide(probabilities)
    passes = p != 0
    dp = torch.where(passes, _wide(dout), 0)
    D = (p * dp).sum(-1, keepdim=True)
    return torch.where(passes, float(scale) * p * (dp - D), 0).to(probabilities.dtype)


class _MaskedSoftmax(torch.autograd.Function):
    """Autograd's own derivative would look at gradients of what is not attended to, and keep more
    than the probabilities.
    """

    @staticmethod
    def forward(scores: Tensor, attended: Tensor, scale: float) -> Tensor:
        logits = torch.where(attended, scale * _wide(scores), -math.inf)
        if not logits.shape[-1]:  # there is no maximum of nothing
            return scores.clone()
        top = logits.amax(-1, keepdim=True)
        e = torch.exp(logits - torch.where(top == -math.inf, 0, top))
        total = e.sum(-1, keepdim=True)
        p = e / torch.where(total == 0, 1, total)
        return torch.where(attended, p, 0).to(scores.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.scale = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (probabilities,) = ctx.saved_tensors
        return masked_softmax_backward(dout, probabilities, scale=ctx.scale), None, None


def _over_channels(x: Tensor) -> Tensor:
    """The mean, and of no channels 0."""
    return x.sum(-1, keepdim=True) / max(1, x.shape[-1])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
