"""The operand check: every wrong call is named, and every right one described."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isoform.reference.attention_contract import (
    OPTIONS,
    Mask,
    SequenceShape,
    attention_call,
    resolve_window,
)
from isoform.reference.contract import Capabilities, Unsupported

SHAPE = SequenceShape(B=2, Q=5, K=5, H=4, G=2, D=8)
CROSS = SequenceShape(B=2, Q=5, K=7, H=4, G=2, D=8)


def array(*shape: int, dtype: str = "float32", device: str = "cpu") -> Any:
    """All that the contract looks at."""
    return SimpleNamespace(shape=shape, dtype=dtype, device=device)


def operands(shape: SequenceShape = SHAPE, **changed: Any) -> dict[str, Any]:
    return {name: array(*shape.of(name)) for name in ("q", "k", "v")} | changed


def places(*shape: int, dtype: str = "int64", device: str = "cpu") -> Any:
    return array(*shape, dtype=dtype, device=device)


def test_a_bare_call():
    call = attention_call(**operands())
    assert call.operation == "attention" and call.shape == SHAPE and call.dtype == "float32"
    assert call.operands == call.gradients == frozenset() and not call.lse


def test_a_call_says_what_it_uses():
    everything = {
        "positions": places(5),
        "key_positions": places(2, 5),
        "segments": places(2, 5, dtype="int32"),
        "key_segments": places(5, dtype="int32"),
        "causal": True,
        "window": (3, 0),
    }
    call = attention_call(**operands(), **everything, gradients=("q",), lse=True)
    assert call.operands == set(everything) == set(OPTIONS)
    assert call.gradients == {"q"} and call.lse
    for name in OPTIONS:
        able = Capabilities("attention", operands=frozenset(OPTIONS) - {name})
        assert able.unsupported_reasons(call) == (f"operand {name}",)
    with pytest.raises(Unsupported, match="operand causal; operand key_positions; operand"):
        Capabilities("attention", operands=frozenset()).require(call)


@pytest.mark.parametrize("window", [None, -1, (-1, -1), [-1, -1]], ids=str)
def test_a_window_without_end_is_none(window):
    assert attention_call(**operands(), window=window).operands == frozenset()


@pytest.mark.parametrize(
    ("window", "causal", "sides"),
    [
        (None, False, (-1, -1)),
        (None, True, (-1, 0)),
        (3, False, (3, 3)),
        (3, True, (3, 0)),
        (np.int64(3), False, (3, 3)),
        ((2, 5), False, (2, 5)),
        ((2, 5), True, (2, 0)),
        ((2, -1), True, (2, 0)),
        ((0, 0), False, (0, 0)),
        ([4, -1], False, (4, -1)),
    ],
    ids=str,
)
def test_windows(window, causal, sides):
    """SEQ-3."""
    assert resolve_window(window, causal) == sides


def test_sizes_of_a_shape():
    assert CROSS.of("q") == (2, 5, 4, 8) and CROSS.of("key_positions") == (2, 7)
    assert CROSS.logits == 2 * 4 * 5 * 7 and CROSS.largest == 2 * 5 * 4 * 8
    assert SequenceShape(1, 9, 9, 2, 2, 1).largest == 162
    assert str(CROSS) == "B=2,Q=5,K=7,H=4,G=2,D=8"
    empty = SequenceShape(0, 0, 0, 0, 0, 8)
    assert attention_call(**operands(empty)).shape == empty


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"q": array(2, 5, 32)}, ValueError, r"q must have 4 axes \[B, Q, H, D\], got shape"),
        ({"k": array(3, 5, 2, 8)}, ValueError, r"k must have B=2 on axis 0 of \[B, K, G, D\]"),
        ({"k": array(2, 5, 2, 4)}, ValueError, "k must have D=8 on axis 3"),
        ({"v": array(2, 4, 2, 8)}, ValueError, "v must have K=5 on axis 1"),
        ({"v": array(2, 5, 4, 8)}, ValueError, "v must have G=2 on axis 2"),
        ({"q": array(2, 5, 3, 8)}, ValueError, "key/value heads must divide query heads, got G=2"),
        ({"q": array(2, 5, 4, 0), "k": array(2, 5, 2, 0), "v": array(2, 5, 2, 0)}, ValueError,
         "head dim D must be at least 1"),
        ({"k": "k"}, TypeError, "k must be an array, got str"),
        ({"positions": [0, 1]}, TypeError, "positions must be an array, got list"),
        ({"k": array(2, 5, 2, 8, dtype="float16")}, TypeError, "k must be float32, the dtype of q"),
        ({"q": array(2, 5, 4, 8, dtype="int32")}, TypeError, "q must be one of float16, bfloat16"),
        ({"positions": array(5)}, TypeError, "positions must be int32 or int64, got float32"),
        ({"segments": places(5, dtype="bool")}, TypeError, "segments must be int32 or int64, got"),
        ({"positions": places(4)}, ValueError, r"positions must have Q=5 on axis 0 of \[Q\]"),
        ({"positions": places(1, 5)}, ValueError, r"positions must have B=2 on axis 0 of \[B, Q\]"),
        ({"positions": places(2, 1, 5)}, ValueError, r"positions must have 2 axes \[B, Q\], got"),
        ({"segments": places(2, 4)}, ValueError, "segments must have Q=5 on axis 1"),
        ({"positions": places(5), "key_positions": places(6)}, ValueError,
         r"key_positions must have K=5 on axis 0 of \[K\]"),
        ({"key_positions": places(5)}, ValueError, "positions must be given where key_positions"),
        ({"key_segments": places(5)}, ValueError, "segments must be given where key_segments are"),
        ({"segments": places(5, device="cuda:0")}, ValueError, "segments is on cuda:0, but q is"),
        ({"scale": float("inf")}, ValueError, "scale must be finite"),
        ({"scale": "1"}, TypeError, "scale must be a real number or None, got str"),
        ({"causal": 1}, TypeError, "causal must be a bool, got int"),
        ({"causal": None}, TypeError, "causal must be a bool, got NoneType"),
        ({"window": -2}, ValueError, r"window must not be below -1 \(no end\), got -2"),
        ({"window": (3, -2)}, ValueError, r"window must not be below -1 \(no end\), got \(3, -2\)"),
        ({"window": (1, 2, 3)}, ValueError, r"window must be one number or \(left, right\), got"),
        ({"window": 1.5}, TypeError, "window must be made of integers, got 1.5"),
        ({"window": (1, None)}, TypeError, r"window must be made of integers, got \(1, None\)"),
        ({"window": True}, TypeError, "window must be made of integers, got True"),
    ],
    ids=lambda x: None,
)  # fmt: skip
def test_wrong_calls(changed, error, says):
    """SEQ-1 and SEQ-12: the message names the operand."""
    with pytest.raises(error, match=says):
        attention_call(**operands(**changed))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"causal": True}, "positions and key_positions must be given with causal or window where"),
        ({"window": 3}, "positions and key_positions must be given .* where Q=5 is not K=7"),
        ({"positions": places(5)}, "key_positions must be given where positions are and Q=5 is"),
        ({"segments": places(5)}, "key_segments must be given where segments are and Q=5 is not"),
    ],
    ids=lambda x: None,
)
def test_places_that_are_left_open(changed, says):
    """SEQ-2: which queries and keys belong together is not guessed where Q is not K."""
    with pytest.raises(ValueError, match=says):
        attention_call(**operands(CROSS, **changed))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"window": -1},
        {"causal": True, "positions": places(5), "key_positions": places(7)},
        {"segments": places(2, 5), "key_segments": places(7)},
    ],
    ids=lambda x: None,
)
def test_places_that_are_not(changed):
    """SEQ-2."""
    assert attention_call(**operands(CROSS, **changed)).shape == CROSS


def test_tiles_of_a_mask_are_parts_of_it():
    """SEQ-3."""
    rng = np.random.default_rng(0)
    whole = Mask(*(rng.integers(-1, 4, (2, 9)) for _ in range(4)), left=2, right=1)
    rows, keys = slice(2, 6), slice(1, 9)
    pairs = whole.tile(rows, keys).pairs()
    np.testing.assert_array_equal(pairs, whole.pairs()[..., rows, keys])
    assert pairs.dtype == bool and pairs.shape == (2, 1, 4, 8) and 0 < pairs.sum() < pairs.size
    one = whole._replace(segments=None, key_segments=None)
    assert one.real_keys() is None and one.tile(rows).pairs().shape == (2, 1, 4, 9)
    np.testing.assert_array_equal(whole.real_keys(), whole.key_segments >= 0)


def test_the_contract_needs_no_numpy_of_its_own():
    """Nothing but the standard library: a kernel's host code can check a call before any import."""
    program = "import sys, isoform.reference.attention_contract; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
