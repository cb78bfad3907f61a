"""Without a GPU: what the doors to attention over a sequence refuse, and what they ask for."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

from isoform.kernels import attention as attention_function
from isoform.kernels import (
    attention_backward,
    attention_block,
    attention_block_backward,
    attention_vjp,
    explain_attention,
)
from isoform.kernels.attention_arguments import NO_END, Options
from isoform.reference import numpy as oracle
from isoform.reference.contract import Unsupported

door = sys.modules["isoform.kernels.attention"]
FORWARDS = (attention_function, attention_vjp, attention_block)
BACKWARDS = (attention_backward, attention_block_backward)


def operands(dtype="float32", **sizes):
    B, Q, K, H, G, D = ({"B": 1, "Q": 3, "K": 4, "H": 2, "G": 1, "D": 5} | sizes).values()
    return {
        "q": np.ones((B, Q, H, D), dtype),
        "k": np.ones((B, K, G, D), dtype),
        "v": np.ones((B, K, G, D), dtype),
    }


def before(backward, given):
    """What comes before q in a backward's arguments, and after v."""
    B, Q, H, _ = given["q"].shape
    statistics = [np.zeros((B, H, Q), "f4")] * 2
    after = statistics if backward is attention_block_backward else []
    return given["q"], [*given.values(), *after]


def test_importing_it_imports_neither_torch_nor_cupy():
    code = (
        "import sys, isoform.kernels.attention;sys.exit(bool({'torch', 'cupy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "name",
    ["attention", "attention_backward", "attention_block", "attention_block_backward"],
)
def test_the_signature_is_the_references(name):
    """But for where it computes, which is a kernel's name here."""
    ours = inspect.signature(getattr(door, name)).parameters
    theirs = inspect.signature(getattr(oracle, name)).parameters
    own = {"deterministic", "low_memory", "kernel"}
    assert [x for x in ours if x not in own] == [x for x in theirs if x != "compute_dtype"]
    assert all(ours[x].default == theirs[x].default for x in ours if x not in own)


@pytest.mark.parametrize("forward", FORWARDS)
def test_what_is_on_a_cpu_is_declined_with_the_remedy(forward):
    with pytest.raises(Unsupported, match=r"device cpu.*move the operands to a GPU"):
        forward(**operands())


@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_backward_declines_alike(backward):
    dout, rest = before(backward, operands())
    with pytest.raises(Unsupported, match="device cpu"):
        backward(dout, *rest)


@pytest.mark.parametrize("forward", [*FORWARDS, explain_attention])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"causal": True}, ValueError, "positions and key_positions must be given"),
        ({"causal": 1}, TypeError, "causal must be a bool"),
        ({"window": -2}, ValueError, "window must not be below"),
        ({"segments": np.zeros(3, "i2")}, TypeError, "segments must be int32 or int64"),
        ({"segments": np.zeros(3, "i4")}, ValueError, "key_segments must be given"),
        ({"scale": np.inf}, ValueError, "scale must be finite"),
        ({"v": np.ones((1, 4, 1, 6), "f4")}, ValueError, "v must have D=5"),
    ],
)
def test_a_wrong_call_is_wrong_before_it_is_unsupported(forward, options, error, message):
    with pytest.raises(error, match=message):
        forward(**operands() | options)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize(
    ("dout", "error", "message"),
    [
        (None, TypeError, "dout must be an array, got NoneType"),
        (np.ones((1, 3, 2, 5), "f8"), TypeError, "dout must be float32, got float64"),
        (np.ones((1, 3, 2, 4), "f4"), ValueError, r"dout must have shape \(1, 3, 2, 5\)"),
    ],
)
def test_a_cotangent_must_fit(backward, dout, error, message):
    _, rest = before(backward, operands())
    with pytest.raises(error, match=message):
        backward(dout, *rest)


@pytest.mark.parametrize("name", ["lse", "delta"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (np.zeros((1, 2, 3), "f8"), TypeError, "must be float32, got float64"),
        (np.zeros((1, 3, 2), "f4"), ValueError, r"must have shape \(1, 2, 3\), got \(1, 3, 2\)"),
    ],
)
def test_statistics_of_the_whole_must_fit(name, wrong, error, message):
    right = np.zeros((1, 2, 3), "f4")
    statistics = {"lse": right, "delta": right} | {name: wrong}
    with pytest.raises(error, match=f"{name} {message}"):
        attention_block_backward(operands()["q"], **operands(), **statistics)


def test_every_reason_is_given():
    with pytest.raises(Unsupported) as raised:
        attention_function(**operands("float64", D=300))
    text = " ".join(raised.value.reasons)
    for reason in ("device cpu", "dtype float64", "head dim D=300"):
        assert reason in text


@pytest.fixture
def asked(monkeypatch):
    """What the module behind the door is asked to do, on an H100."""
    calls = []

    class Door:
        @staticmethod
        def forward(kernel, given, options, scale, **more):
            calls.append((kernel.name, given, options, scale))
            return given["q"], np.zeros((*given["q"].shape[::2], given["q"].shape[1]), "f4")

        @staticmethod
        def backward(kernel, given, options, scale):
            calls.append((kernel.name, given, options, scale))
            return [given[name] for name in "qkv"]

    monkeypatch.setattr(door, "whereabouts", lambda x: ("cuda", "sm_90"))
    monkeypatch.setattr(door, "_door", lambda q: Door)
    return calls


def test_a_kernel_asked_for_by_name_runs_or_says_why_not(asked):
    with pytest.raises(ValueError, match=r"kernel must be one of .*got 'fastest'"):
        attention_function(**operands(), kernel="fastest")
    with pytest.raises(Unsupported, match="cuda-tensor: dtype float32") as raised:
        attention_function(**operands(), kernel="cuda-tensor")
    assert len(raised.value.reasons) == 1
    assert asked == []


def test_explain_lists_all_kernels_in_their_order(asked):
    explained = explain_attention(**operands("float16"), window=3, **shards())
    assert sorted(explained) == ["cuda-cudnn", "cuda-flash", "cuda-plain", "cuda-tensor"]
    first = next(name for name, why in explained.items() if not why)
    attention_function(**operands("float16"), window=3, **shards())
    assert asked[0][0] == first == "cuda-tensor"
    assert any("operand window" in said for said in explained["cuda-flash"])


def shards():
    return {"positions": np.arange(3), "key_positions": np.arange(4)}


def test_defaults_are_filled_in(asked):
    own = {"positions": np.arange(3), "segments": np.zeros((1, 3), "i4")}
    attention_function(**operands(K=3), causal=True, **own)
    ((_, given, options, scale),) = asked
    assert given["key_positions"] is own["positions"]
    assert given["key_segments"] is own["segments"]
    assert (options, scale) == (Options(NO_END, 0), 5**-0.5)


def test_positions_of_which_nothing_depends_are_left_out(asked):
    attention_function(**operands(), **shards())
    ((_, given, _, _),) = asked
    assert set(given) == {"q", "k", "v"}


def test_blocks_are_wide_and_others_are_not(asked):
    attention_block(**operands(), scale=2)
    dout, rest = before(attention_block_backward, operands())
    attention_block_backward(dout, *rest)
    attention_backward(dout, **operands())
    assert [options.wide for _, _, options, _ in asked] == [True, True, False, False]
    assert asked[0][-1] == 2.0
    assert {"lse", "delta"} < asked[1][1].keys()
    assert {"lse", "out"} < asked[3][1].keys()


def test_a_vjp_takes_back_as_often_as_it_is_asked(asked):
    out, take_back = attention_vjp(**operands())
    assert [take_back(out)._fields for _ in range(2)] == [("dq", "dk", "dv")] * 2
    assert len(asked) == 3
    with pytest.raises(ValueError, match="dout must have shape"):
        take_back(out[:, :2])
