r"""LayerNorm, bias and GeLU, bias, dropout and residual, and the masked softmax, defined: what
stands between matrix products.

With u = x + b, b the same for all tokens, the first is GeLU(u) = u Φ(u), Φ the normal distribution
(Hendrycks and Gimpel, arXiv 1606.08415), of which there are two forms::

    Φ(u) = ½ erfc(−u/√2)                                 approximate="none"
    Φ(u) = ½ (1 + tanh √(2/π) (u + 0.044715 u³))         approximate="tanh"

The second is residual + m∘u / (1 − p): m is 0 for the share p of all elements that is dropped, and
the factor keeps the expectation.

Backward
--------
u is x shifted, so x has the gradient of u, and b, which is in every token, the sum of it over all::

    u̅ = y̅ (Φ(u) + u Φ'(u))         or   u̅ = y̅∘m / (1 − p)
    x̅ = u̅        b̅ = Σ_tokens u̅

The residual's gradient is y̅. Of the dropout, the backward needs m alone, and m is a function of the
seed: it is computed again, and nothing is stored.

The draws
---------
Philox is a cipher used as a generator: of a key, the seed, and a counter, the place, it makes 128
bits that look random, with nothing kept between. A round multiplies two words of the counter, and
mixes the halves of the products with the other two and the key::

    (c₀, c₁, c₂, c₃) → (hi(M₁c₂) ^ c₁ ^ k₀,  lo(M₁c₂),  hi(M₀c₀) ^ c₃ ^ k₁,  lo(M₀c₀))

Ten rounds make a counter's bits. Token n, all axes but the last taken as one, has for each eight
channels from 8j on the counter (j, n mod 2³², ⌊n / 2³²⌋, 0), and its four words are eight draws of
16 bits, the lower half of a word first. An element is dropped where its draw is below 65536 p.

LayerNorm
---------
A token's channels, less their mean and divided by their standard deviation, then scaled and shifted
by what is learned (Ba, Kiros and Hinton, arXiv 1607.06450)::

    n_c = (x_c − μ) / σ        μ = mean_c x_c        σ² = mean_c (x_c − μ)² + ε        y = w∘n + b

n has mean 0 and, but for ε, mean square 1, whatever x is: to move x along 1 or along n does not
move n, so that the gradient of x is that of n less its parts along both. With g = w∘y̅::

    x̅ = (g − mean_c g − n mean_c (g∘n)) / σ        w̅ = Σ_tokens y̅∘n        b̅ = Σ_tokens y̅

The masked softmax
------------------
Of a query's scores s, over the keys j that it attends to::

    p_j = e^{scale·s_j − t} / Σ_i e^{scale·s_i − t}        t = max_i scale·s_i

and p_j = 0 for all others. What t is makes no difference to p; with the maximum no exponential
overflows, and one of them is 1, so that the sum is no less. Of a query that attends to no key, or
whose every scale·s_j is −∞, all p_j are 0.

Its derivative is ∂p_i/∂s_j = scale·p_j (δ_ij − p_i): a score raises its own probability, and lowers
all by what that takes from them. So, given p̅, the gradient by p::

    s̅_j = scale·p_j (p̅_j − D)        D = Σ_i p_i p̅_i

D is one number for a query, and nothing but p is needed. Where p_j is 0 nothing passes back, and
p̅_j is not looked at: a key that is not attended to is part of nothing, whatever its score or its
p̅ holds. Among the keys that are, a NaN, or a scale·s that is +∞, makes the query's probabilities
NaN, as the definition does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

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

Array = npt.NDArray[Any]

LOW = np.uint64(0xFFFFFFFF)
HIGH = np.uint64(32)


def bias_gelu(x: Array, bias: Array, *, approximate: str = "tanh") -> Array:
    """GeLU of ``x + bias``, in float64, rounded once.

    Args:
        x: Activations ``[..., C]``, any float dtype.
        bias: ``[C]``, in x's dtype.
        approximate: ``"tanh"`` or ``"none"``.

    Returns:
        ``out [..., C]`` in x's dtype.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: An operand's shape, or ``approximate``, is wrong.
    """
    check_operands({"x": x, "bias": bias})
    check_approximate(approximate)
    u = _wide(x) + _wide(bias)
    with np.errstate(over="ignore"):  # of an exponential, whose inverse is 0
        below, _ = normal(u, approximate)
    return (u * below).astype(x.dtype)


def bias_gelu_backward(
    dout: Array, x: Array, bias: Array, *, approximate: str = "tanh"
) -> tuple[Array, Array]:
    """Gradients of :func:`bias_gelu`, given that of its output.

    Args:
        dout: Gradient of the loss by ``out``, ``[..., C]``.
        x, bias, approximate: As in the forward.

    Returns:
        ``dx [..., C]`` and ``dbias [C]``.

    Raises:
        TypeError, ValueError: As in the forward.
    """
    check_operands({"x": x, "bias": bias, "dout": dout})
    check_approximate(approximate)
    u = _wide(x) + _wide(bias)
    with np.errstate(over="ignore"):
        below, density = normal(u, approximate)
    du = _wide(dout) * (below + u * density)
    return du.astype(x.dtype), _over_tokens(du).astype(x.dtype)


def normal(u: Array, approximate: str) -> tuple[Array, Array]:
    """Φ(u) and Φ'(u)."""
    if approximate == "none":
        below = np.asarray(np.frompyfunc(math.erfc, 1, 1)(-u / math.sqrt(2)), np.float64) / 2
        return below, np.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    v = root * (u + cubic * u**3)
    below, above = (
        1 / (1 + np.exp(-2 * each)) for each in (v, -v)
    )  # (1 ± tanh v) / 2, every digit
    return below, 2 * below * above * root * (1 + 3 * cubic * u**2)


def bias_dropout_residual(x: Array, bias: Array, residual: Array, p: float, *, seed: int) -> Array:
    """``residual + dropout(x + bias)``, in float64, rounded once.

    Args:
        x: Activations ``[..., C]``, any float dtype.
        bias: ``[C]``, in x's dtype.
        residual: ``[..., C]``, in x's dtype.
        p: The share that is dropped, rounded to a multiple of 1/65536.
        seed: What is dropped is a function of it.

    Returns:
        ``out [..., C]`` in x's dtype. What is dropped is not looked at: NaN there does no harm.

    Raises:
        TypeError: An operand's dtype, or the type of another argument, is wrong.
        ValueError: An operand's shape, p or the seed is wrong.
    """
    check_operands({"x": x, "bias": bias, "residual": residual})
    dropped = _dropped(_wide(x) + _wide(bias), p, seed)
    return (_wide(residual) + dropped).astype(x.dtype)


def bias_dropout_residual_backward(
    dout: Array, p: float, *, seed: int
) -> tuple[Array, Array, Array]:
    """Gradients of :func:`bias_dropout_residual`, given that of its output.

    Args:
        dout: Gradient of the loss by ``out``, ``[..., C]``.
        p, seed: As in the forward.

    Returns:
        ``dx [..., C]``, ``dbias [C]``, and ``dresidual``, which is ``dout``.

    Raises:
        TypeError, ValueError: As in the forward.
    """
    check_operands({"dout": dout})
    du = _dropped(_wide(dout), p, seed)
    return du.astype(dout.dtype), _over_tokens(du).astype(dout.dtype), dout


def draws(shape: tuple[int, ...], seed: int) -> Array:
    """The draw of every element of an array ``[..., C]``, from 0 to 65535."""
    check_seed(seed)
    *tokens, channels = shape
    n = np.arange(math.prod(tokens), dtype=np.uint64)[:, None]
    j = np.arange(-(-channels // 8), dtype=np.uint64)[None, :]
    words = philox(np.broadcast_arrays(j, n & LOW, n >> HIGH, np.zeros((), np.uint64)), seed)
    halves = [half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    found: Array = np.stack(halves, -1).reshape(len(n), 8 * j.size)[:, :channels].reshape(shape)
    return found


def philox(counter: Any, seed: int) -> list[Array]:
    """Philox 4x32-10 of counters, four arrays of words of 32 bits: four such arrays."""
    c0, c1, c2, c3 = counter
    keys = [seed >> shift & 0xFFFFFFFF for shift in (0, 32)]
    m0, m1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
    for _ in range(ROUNDS):
        k0, k1 = (np.uint64(key) for key in keys)
        first, second = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (
            (second >> HIGH) ^ c1 ^ k0,
            second & LOW,
            (first >> HIGH) ^ c3 ^ k1,
            first & LOW,
        )
        keys = [key + more & 0xFFFFFFFF for key, more in zip(keys, INCREMENTS, strict=True)]
    return [c0, c1, c2, c3]


def layer_norm(x: Array, weight: Array, bias: Array, *, epsilon: float = 1e-5) -> Array:
    """LayerNorm over the channels, in float64, rounded once.

    Args:
        x: Activations ``[..., C]``, any float dtype.
        weight, bias: ``[C]``, in x's dtype.
        epsilon: What is added to the variance, above 0.

    Returns:
        ``out [..., C]`` in x's dtype.

    Raises:
        TypeError: An operand's dtype, or epsilon's type, is wrong.
        ValueError: An operand's shape, or epsilon, is wrong.
    """
    check_operands({"x": x, "weight": weight, "bias": bias})
    check_epsilon(epsilon)
    n, _ = normalized(_wide(x), epsilon)
    return (_wide(weight) * n + _wide(bias)).astype(x.dtype)


def layer_norm_backward(
    dout: Array, x: Array, weight: Array, *, epsilon: float = 1e-5
) -> tuple[Array, Array, Array]:
    """Gradients of :func:`layer_norm`, given that of its output.

    Args:
        dout: Gradient of the loss by ``out``, ``[..., C]``.
        x, weight, epsilon: As in the forward.

    Returns:
        ``dx [..., C]``, ``dweight [C]`` and ``dbias [C]``.

    Raises:
        TypeError, ValueError: As in the forward.
    """
    check_operands({"x": x, "weight": weight, "dout": dout})
    check_epsilon(epsilon)
    dy = _wide(dout)
    n, inverse = normalized(_wide(x), epsilon)
    g = _wide(weight) * dy
    dx = inverse * (g - _over_channels(g) - n * _over_channels(g * n))
    sums = (_over_tokens(each).astype(x.dtype) for each in (dy * n, dy))
    return dx.astype(x.dtype), *sums


def normalized(x: Array, epsilon: float) -> tuple[Array, Array]:
    """What is scaled and shifted, n, and 1 / σ."""
    centred = x - _over_channels(x)
    inverse = 1 / np.sqrt(_over_channels(centred**2) + float(epsilon))
    return centred * inverse, inverse


def masked_softmax(
    scores: Array, *, mask: Array | None = None, causal: bool = False, scale: float = 1.0
) -> Array:
    """Probabilities over the keys, of ``scale * scores``, in float64, rounded once.

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
        ValueError: An operand's shape or the scale is wrong, or causal is, as Q is not K.
    """
    check_softmax(scores, mask, causal, scale)
    attended = attended_to(scores.shape, mask, causal)
    with np.errstate(invalid="ignore"):  # of infinite scores
        logits = np.where(attended, float(scale) * _wide(scores), -np.inf)
        top = logits.max(-1, keepdims=True, initial=-np.inf)
        e = np.exp(logits - np.where(top == -np.inf, 0, top))
        total = e.sum(-1, keepdims=True)
        p = e / np.where(total == 0, 1, total)
    return np.where(attended, p, 0).astype(scores.dtype)


def masked_softmax_backward(dout: Array, probabilities: Array, *, scale: float = 1.0) -> Array:
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
    dp = np.where(passes, _wide(dout), 0)
    with np.errstate(invalid="ignore"):  # of infinite gradients
        D = (p * dp).sum(-1, keepdims=True)
        ds = np.where(passes, float(scale) * p * (dp - D), 0)
    return ds.astype(probabilities.dtype)


def attended_to(shape: tuple[int, ...], mask: Array | None, causal: bool) -> Array:
    """Which keys each query attends to: bool, of a shape that broadcasts to ``[B, H, Q, K]``."""
    attended = np.ones((1, 1, 1, 1), bool) if mask is None else mask
    return attended & np.tri(*shape[2:], dtype=np.bool_) if causal else attended


def _dropped(u: Array, p: float, seed: int) -> Array:
    threshold = threshold_of(p)
    factor = DRAWS / (DRAWS - threshold) if threshold < DRAWS else 0.0
    return np.where(draws(u.shape, seed) < threshold, 0.0, factor * u)


def _over_tokens(du: Array) -> Array:
    summed: Array = du.reshape(math.prod(du.shape[:-1]), du.shape[-1]).sum(0)
    return summed


def _over_channels(x: Array) -> Array:
    """The mean, and of no channels 0."""
    mean: Array = x.sum(-1, keepdims=True) / max(1, x.shape[-1])
    return mean


def _wide(x: Array) -> Array:
    return x.astype(np.float64)
