"""Every wrong call of rotary embedding is answered by an exception that names what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isoform.reference.contract import Capabilities, Unsupported
from isoform.reference.rotary_contract import (
    ALL_FEATURES,
    BASIC,
    NAME,
    RotaryShape,
    resolve_rotary_dim,
    rotary_call,
)
from isoform.reference.rotary_scaling import SCALINGS, DynamicNTK, Linear, LongRoPE, YaRN


class Elsewhere:
    """An array that says it lies on another device."""

    device = "cuda:0"

    def __init__(self, x: Any) -> None:
        self.shape, self.dtype = x.shape, x.dtype


def operands(**more: Any) -> dict[str, Any]:
    return {"x": np.zeros((2, 5, 3, 8), np.float32), "positions": np.arange(5), **more}


def test_what_a_call_asks_for() -> None:
    call = rotary_call(**operands())
    assert (call.operation, call.dtype) == (NAME, "float32")
    assert call.shape == RotaryShape(2, 5, 3, 8)
    assert call.operands == {"layout=half"}
    by_example = np.zeros((2, 5), np.int8)
    everything = rotary_call(
        **operands(positions=by_example),
        rotary_dim=6,
        layout="interleaved",
        scaling=YaRN(4.0, 64),
        gradients=["x"],
        device="cuda",
        architecture="sm_90",
    )
    assert everything.operands == {
        *("layout=interleaved", "rotary_dim<D", "scaling=yarn", "positions=[B,L]")
    }
    assert everything.gradients == {"x"}
    assert (everything.device, everything.architecture) == ("cuda", "sm_90")


def test_rotary_dim_of_all_channels_is_not_partial() -> None:
    assert rotary_call(**operands(), rotary_dim=8) == rotary_call(**operands())
    assert rotary_call(**operands(), rotary_dim=np.int64(8)) == rotary_call(**operands())


def test_the_shape() -> None:
    shape = RotaryShape(2, 5, 3, 8)
    assert shape.of("x") == shape.of("out") == (2, 5, 3, 8)
    assert shape.of("positions") == (2, 5)
    assert shape.largest == 240
    assert str(shape) == "B=2,L=5,H=3,D=8"


def test_every_feature_can_be_asked_for() -> None:
    assert ALL_FEATURES >= BASIC
    assert {f"scaling={name}" for name in SCALINGS} <= ALL_FEATURES
    assert len(ALL_FEATURES) == 4 + len(SCALINGS)


def test_what_is_not_supported_is_said_in_full() -> None:
    narrow = Capabilities(NAME, operands=frozenset({"layout=half"}), lse=False, min_length=1)
    narrow.require(rotary_call(**operands()))
    call = rotary_call(**operands(positions=np.zeros((2, 5), int)), rotary_dim=4, scaling=Linear(2))
    with pytest.raises(Unsupported) as raised:
        narrow.require(call, "narrow")
    assert raised.value.reasons == ("positions=[B,L]", "rotary_dim<D", "scaling=linear")
    empty = rotary_call(np.zeros((0, 5, 3, 8), np.float32), np.arange(5))
    assert narrow.unsupported_reasons(empty) == ("an empty axis in B=0,L=5,H=3,D=8",)
    short = rotary_call(np.zeros((1, 0, 3, 8), np.float32), np.arange(0))
    assert narrow.unsupported_reasons(short) == ("lengths L=0 (at least 1)",)


@pytest.mark.parametrize(
    ("wrong", "raises", "said"),
    [
        ({"x": [1.0]}, TypeError, "x must be an array, got list"),
        ({"positions": 3}, TypeError, "positions must be an array, got int"),
        ({"x": np.zeros((2, 5, 3, 8), int)}, TypeError, "x must be one of float16"),
        ({"positions": np.zeros(5)}, TypeError, "positions must be integers, got float64"),
        ({"positions": np.zeros(5, bool)}, TypeError, "positions must be integers, got bool"),
        ({"x": np.zeros((5, 3, 8))}, ValueError, "x must have 4 axes [B, L, H, D], got shape"),
        ({"positions": np.arange(4)}, ValueError, "with L=5, B=2 of x, got shape (4,)"),
        ({"positions": np.zeros((1, 5), int)}, ValueError, "positions must be [L] or [B, L]"),
        ({"positions": np.zeros((), int)}, ValueError, "positions must be [L] or [B, L]"),
        ({"positions": Elsewhere(np.arange(5))}, ValueError, "positions is on cuda:0, but x is on"),
        ({"base": 1}, ValueError, "base must be finite and above 1, got 1"),
        ({"base": float("nan")}, ValueError, "base must be finite and above 1, got nan"),
        ({"base": "1e4"}, TypeError, "base must be a real number, got str"),
        ({"base": True}, TypeError, "base must be a real number, got bool"),
        ({"rotary_dim": 3}, ValueError, "even and from 2 to D=8, got rotary_dim=3"),
        ({"rotary_dim": 0}, ValueError, "even and from 2 to D=8, got rotary_dim=0"),
        ({"rotary_dim": 10}, ValueError, "even and from 2 to D=8, got rotary_dim=10"),
        ({"rotary_dim": -2}, ValueError, "even and from 2 to D=8, got rotary_dim=-2"),
        ({"rotary_dim": 4.0}, TypeError, "rotary_dim must be an int or None, got float"),
        ({"rotary_dim": True}, TypeError, "rotary_dim must be an int or None, got bool"),
        ({"layout": "neox"}, ValueError, "layout must be one of half, interleaved, got 'neox'"),
        ({"layout": None}, ValueError, "layout must be one of half, interleaved, got None"),
        ({"scaling": "yarn"}, TypeError, "scaling must be None or one of Linear, DynamicNTK"),
        ({"scaling": Linear}, TypeError, "scaling must be None or one of Linear, DynamicNTK"),
        (
            {"scaling": LongRoPE((1.0,), (1.0,) * 4, 64, 64)},
            ValueError,
            "scaling: short_factors must have rotary_dim / 2 = 4 numbers, got 1",
        ),
        (
            {"scaling": LongRoPE((1.0,) * 4, (), 64, 64)},
            ValueError,
            "scaling: long_factors must have rotary_dim / 2 = 4 numbers, got 0",
        ),
        (
            {"scaling": DynamicNTK(2.0, 64, 128), "rotary_dim": 2},
            ValueError,
            "scaling: rotary_dim must be at least 4 with DynamicNTK",
        ),
    ],
)
def test_what_is_wrong_is_named(wrong: Any, raises: type[Exception], said: str) -> None:
    with pytest.raises(raises) as raised:
        rotary_call(**operands(**wrong))
    assert said in str(raised.value)


def test_an_odd_head_dim_needs_a_rotary_dim() -> None:
    x = np.zeros((2, 5, 3, 7), np.float32)
    with pytest.raises(ValueError, match="from 2 to D=7, got rotary_dim=None"):
        rotary_call(x, np.arange(5))
    assert rotary_call(x, np.arange(5), rotary_dim=6).shape.D == 7
    assert resolve_rotary_dim(None, 6) == 6


def test_the_gradient_is_called_by_its_name() -> None:
    with pytest.raises(ValueError, match="of dout, got shape"):
        rotary_call(**operands(positions=np.arange(3)), called="dout")
