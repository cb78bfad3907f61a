"""What the tests of attention over a sequence share: random calls, their masks, and 60 digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from isoform.reference.attention_contract import SequenceShape

Array = Any


@dataclass
class SequenceCall:
    """One call: q, k and v, the options, and the gradient that comes back."""

    shape: SequenceShape
    operands: dict[str, Array]
    options: dict[str, Any]
    dout: Array = field(repr=False)


VARIANTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "causal": ("causal",),
    "window": ("window",),
    "causal-window": ("causal", "window"),
    "shuffled": ("causal", "positions"),
    "packed": ("causal", "segments"),
    "padded": ("segments", "padding"),
    "everything": ("causal", "window", "positions", "segments", "padding", "per-example"),
}


def draw_call(
    shape: SequenceShape,
    variant: str = "everything",
    *,
    seed: int = 0,
    dtype: Any = np.float64,
    spread: float = 1.0,
    garbage: bool = False,
) -> SequenceCall:
    """Random operands of ``shape``, and options as ``variant`` says.

    Args:
        shape: The sizes; where Q is not K, all places are given.
        variant: A name in VARIANTS.
        seed: Of the random numbers.
        dtype: Of q, k, v and dout.
        spread: Standard deviation of q.
        garbage: Put NaN and ±inf in k and v where keys are padding, and in q and dout where
            queries are.
    """
    rng = np.random.default_rng(seed)
    has = VARIANTS[variant]
    operands = {name: rng.standard_normal(shape.of(name)) for name in ("q", "k", "v")}
    operands["q"] *= spread
    dout = rng.standard_normal(shape.of("out"))
    options: dict[str, Any] = {}
    if "causal" in has:
        options["causal"] = True
    if "window" in has:
        options["window"] = (int(rng.integers(1, 5)), int(rng.integers(0, 4)))

    length, own = max(shape.Q, shape.K), shape.Q == shape.K
    batch = (shape.B,) if "per-example" in has else ()

    def places(draw: Callable[[], Array], name: str) -> None:
        """``name`` for the queries and the keys: some of a sequence's, in any order."""
        rows = [draw() for _ in range(shape.B if batch else 1)]
        whole = np.array(rows, draw().dtype).reshape(*batch, length)
        options[name] = whole[..., : shape.Q]
        if not own:
            keys = np.arange(length)[: shape.K] if name == "positions" else slice(0, shape.K)
            options[f"key_{name}"] = whole[..., keys]

    if "positions" in has or not own:
        ordered = "positions" not in has
        places(lambda: np.arange(length) if ordered else 3 + rng.permutation(length), "positions")
    if "segments" in has:
        padding = "padding" in has  # anywhere then, and the documents are in no order
        places(
            lambda: (
                rng.integers(-1, 2, length) if padding else np.sort(rng.integers(0, 3, length))
            ).astype(np.int32),
            "segments",
        )
    found = SequenceCall(shape, operands, options, dout)
    if garbage:
        _spoil(found, rng)
    found.operands = {name: x.astype(dtype) for name, x in operands.items()}
    found.dout = dout.astype(dtype)
    return found


def _spoil(call: SequenceCall, rng: np.random.Generator) -> None:
    """Write NaN and ±inf into whatever padding holds."""
    queries = call.options["segments"]
    keys = call.options.get("key_segments", queries)
    arrays = {"q": queries, "k": keys, "v": keys, "dout": queries}
    for name, segments in arrays.items():
        x = call.dout if name == "dout" else call.operands[name]
        padding = np.broadcast_to(segments < 0, x.shape[:2])
        x[padding] = np.array([np.nan, np.inf, -np.inf])[rng.integers(3, size=x[padding].shape)]


def pairs_of(call: SequenceCall) -> Array:
    """Who attends to whom, bool ``[B, Q, K]``: the rule SEQ-3 in plain integers, pair by pair."""
    shape, options = call.shape, call.options
    seen = np.zeros((shape.B, shape.Q, shape.K), bool)
    window = options.get("window")
    left, right = (None, None) if window is None else window

    def place(name: str, b: int, index: int, default: int) -> int:
        x = options.get(name)
        if x is None and name.startswith("key_"):
            x = options.get(name.removeprefix("key_"))
        return default if x is None else int(x[b, index] if x.ndim == 2 else x[index])

    for b, i, j in np.ndindex(*seen.shape):
        query, key = place("positions", b, i, i), place("key_positions", b, j, j)
        mine, its = place("segments", b, i, 0), place("key_segments", b, j, 0)
        seen[b, i, j] = (
            mine == its
            and its >= 0
            and not (options.get("causal") and key > query)
            and not (left not in (None, -1) and key < query - left)
            and not (right not in (None, -1) and key > query + right)
        )
    return seen


@st.composite
def _calls(draw: Any) -> SequenceCall:
    tops = {"B": 2, "Q": 9, "K": 9, "G": 2, "H / G": 2, "D": 3}
    sizes = {axis: draw(st.integers(1, top), label=axis) for axis, top in tops.items()}
    if draw(st.booleans(), label="self"):
        sizes["K"] = sizes["Q"]
    sizes["H"] = sizes["G"] * sizes.pop("H / G")
    variant = draw(st.sampled_from(list(VARIANTS)), label="variant")
    return draw_call(SequenceShape(**sizes), variant, seed=draw(st.integers(0, 10**6)), spread=2)


@pytest.fixture(scope="session")
def draw_sequence() -> Callable[..., SequenceCall]:
    """:func:`draw_call`."""
    return draw_call


@pytest.fixture(scope="session")
def sequence_calls() -> Callable[..., st.SearchStrategy[SequenceCall]]:
    """A hypothesis strategy of calls of every variant."""
    return _calls


@pytest.fixture(scope="session")
def attending() -> Callable[[SequenceCall], Array]:
    """:func:`pairs_of`."""
    return pairs_of


@pytest.fixture(scope="session")
def exact_sequence(exact: Any, draw: Any) -> Callable[..., dict[str, Array]]:
    """out, lse and the gradients of a call to 40 digits.

    The 60-digit Evoformer attention leaves out keys with a bias of −inf; all that makes attention
    over a sequence another operation is which keys those are.
    """

    def found(call: SequenceCall, scale: float | None = None) -> dict[str, Array]:
        from isoform.reference.contract import Shape

        B, Q, K, H, G, D = vars(call.shape).values()
        problem = draw(Shape(B, 1, Q, K, H, G, D), ["pair_bias"])
        for name, x in call.operands.items():
            problem.operands[name][:] = x[:, None]
        problem.dout[:] = call.dout[:, None]
        bias = np.where(pairs_of(call), 0.0, -np.inf)[:, None, None]
        problem.operands["pair_bias"][:] = bias
        results = exact(problem, scale)
        return {name: x[:, 0] for name, x in results.items() if name != "dpair_bias"}

    return found
