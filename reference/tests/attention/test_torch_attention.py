"""The PyTorch form against the oracle, under every name; its derivatives against differences."""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from isoform.reference import numpy as oracle
from isoform.reference import torch as forms
from isoform.reference.attention_contract import SequenceShape

SMALL = SequenceShape(B=2, Q=7, K=7, H=4, G=2, D=3)
NAMES = import_module("isoform.reference.torch.attention").__all__
FORWARD: dict[str, Any] = {
    "plain": forms.attention,
    "tiled": lambda *args, **options: forms.attention_tiled(*args, **options, block_q=2),
}
BY_HAND: dict[str, Any] = {
    "plain": forms.attention_backward,
    "tiled": lambda *args, **options: forms.attention_backward_tiled(*args, **options, block_q=2),
}
BLOCKS: dict[str, tuple[Any, Any]] = {
    "plain": (forms.attention_block, forms.attention_block_backward),
    "tiled": (
        lambda *args, **options: forms.attention_block_tiled(*args, **options, block_q=2),
        lambda *args, **options: forms.attention_block_backward_tiled(*args, **options, block_q=2),
    ),
}
every_form = pytest.mark.parametrize("forward", FORWARD.values(), ids=list(FORWARD))
same_examples = settings(deadline=None, derandomize=True, max_examples=60)


def tensors(call: Any, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Any]:
    """The operands as leaves that want a gradient, in ``dtype``; the options with tensors."""
    operands = {
        name: torch.tensor(x, dtype=dtype, requires_grad=True) for name, x in call.operands.items()
    }
    options = {
        name: torch.tensor(x) if isinstance(x, np.ndarray) else x
        for name, x in call.options.items()
    }
    return operands, options


def results(forward: Any, call: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """out, lse and autograd's gradients by name."""
    operands, options = tensors(call, dtype)
    out, lse = forward(**operands, **options, return_lse=True)
    dout = torch.as_tensor(call.dout, dtype=out.dtype)
    dq, dk, dv = torch.autograd.grad(out, list(operands.values()), dout)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def wanted(call: Any) -> dict[str, Any]:
    """The oracle's results by the same names."""
    out, lse = oracle.attention(**call.operands, **call.options, return_lse=True)
    gradients = oracle.attention_backward(call.dout, **call.operands, **call.options)
    return {"out": out, "lse": lse, **gradients._asdict()}


def assert_close(actual: Any, expected: Any, bound: float = 1e-13) -> None:
    for name, x in expected.items():
        np.testing.assert_allclose(actual[name].numpy(), x, rtol=0, atol=bound, err_msg=name)


# --- against the oracle ---


def test_every_name_is_there_with_the_same_arguments():
    """What NumPy has, PyTorch has; only the arithmetic and the tiles' keys are NumPy's choice."""
    module = import_module("isoform.reference.numpy.attention")
    tiled = import_module("isoform.reference.numpy.attention_tiled")
    names = {*module.__all__, *(name for name in vars(tiled) if name.startswith("attention_"))}
    assert set(NAMES) == names
    for name in sorted(names - {"AttentionGradients"}):
        there, here = (
            [p for p in inspect.signature(getattr(of, name)).parameters if p not in own]
            for of, own in ((oracle, ("compute_dtype", "block_k")), (forms, ()))
        )
        assert there == here, name


@same_examples
@given(data=st.data())
def test_equal_to_the_oracle(sequence_calls, data):
    """SEQ-1 to SEQ-8, over random calls, in tiles of any size, by autograd and by hand."""
    call = data.draw(sequence_calls())
    call.options["scale"] = data.draw(st.sampled_from([None, 0.7, -0.2]), label="scale")
    expected = wanted(call)
    block_q = data.draw(st.integers(1, 9), label="block_q")
    assert_close(results(forms.attention, call), expected)
    tiled = lambda **given: forms.attention_tiled(**given, block_q=block_q)  # noqa: E731
    assert_close(results(tiled, call), expected)
    operands, options = tensors(call)
    for backward in (forms.attention_backward, BY_HAND["tiled"]):
        with torch.no_grad():
            found = backward(torch.tensor(call.dout), **operands, **options)
        assert_close(found._asdict(), {name: expected[name] for name in ("dq", "dk", "dv")})


@pytest.mark.parametrize(("attend", "differentiate"), BLOCKS.values(), ids=list(BLOCKS))
@same_examples
@given(data=st.data())
def test_blocks_of_keys_equal_the_whole(sequence_calls, attend, differentiate, data):
    """SEQ-11: forward merged, backward from lse and δ of the whole."""
    call = data.draw(sequence_calls())
    expected = wanted(call)
    places = {"positions": call.options.get("positions", np.arange(call.shape.Q))}
    K = call.shape.K
    places["key_positions"] = call.options.get(
        "key_positions", places["positions"] if call.shape.Q == K else np.arange(K)
    )
    if "segments" in call.options:
        places["key_segments"] = call.options.get("key_segments", call.options["segments"])
    operands, options = tensors(replace(call, options=call.options | places))
    cut = data.draw(st.integers(0, K), label="cut")
    dout = torch.tensor(call.dout)
    with torch.no_grad():
        found, blocks = [], []
        for keys in (slice(0, cut), slice(cut, K)):
            mine = {n: x[..., keys] if n.startswith("key_") else x for n, x in options.items()}
            block = {
                "q": operands["q"],
                **{name: operands[name][:, keys] for name in ("k", "v")},
                **mine,
            }
            blocks.append(block)
            found.append(attend(**block))
        out, lse = forms.merge(*found[0], *found[1])
        delta = forms.attention_delta(dout, out)
        gradients = [differentiate(dout, **block, lse=lse, delta=delta) for block in blocks]
    whole = {
        "out": out,
        "lse": lse,
        "dq": gradients[0].dq + gradients[1].dq,
        "dk": torch.cat([g.dk for g in gradients], 1),
        "dv": torch.cat([g.dv for g in gradients], 1),
    }
    assert_close(whole, expected)
    np.testing.assert_allclose(delta, oracle.attention_delta(call.dout, out.numpy()), atol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@every_form
def test_what_is_not_finite_goes_the_same_way_as_in_the_oracle(
    draw_sequence, relative_error, forward, name, bad
):
    """SEQ-9; which of NaN and ±inf an infinite cotangent gives is up to the order of the sums."""
    call = draw_sequence(SequenceShape(1, 5, 5, 2, 1, 2), "full", seed=2)
    (call.operands | {"dout": call.dout})[name].flat[1] = bad
    expected = wanted(call)
    for result, x in results(forward, call).items():
        actual = x.numpy()
        if name == "dout":
            actual, expected[result] = (
                np.where(np.isfinite(y), y, np.nan) for y in (actual, expected[result])
            )
        assert relative_error(actual, expected[result]) <= 1e-14


@every_form
def test_padding_is_not_seen(draw_sequence, forward):
    """SEQ-4 and SEQ-5: bitwise the results of harmless padding; its own are exactly zero."""
    for seed in range(4):
        clean = draw_sequence(SMALL, "everything", seed=seed)
        dirty = draw_sequence(SMALL, "everything", seed=seed, garbage=True)
        padding = torch.tensor(clean.options["segments"] < 0)
        expected = results(forward, clean)
        actual = results(forward, dirty)
        by_hand = forms.attention_backward(
            torch.tensor(dirty.dout),
            **{name: x.detach() for name, x in tensors(dirty)[0].items()},
            **tensors(dirty)[1],
        )
        for name, x in actual.items():
            assert torch.equal(x, expected[name]), name
        for gradients in (actual, by_hand._asdict()):
            assert all((gradients[name][padding] == 0).all() for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("name", ["q", "dout"])
@pytest.mark.parametrize("form", ["plain", "tiled"])
def test_padding_has_zero_gradient_beside_nan(draw_sequence, form, name):
    """SEQ-4 before SEQ-9."""
    call = draw_sequence(SMALL, "padded", seed=12)
    call.options["segments"] = np.array([0, 0, 0, 0, -1, 0, -1])
    (call.operands | {"dout": call.dout})[name][:, 0] = np.nan
    padding = call.options["segments"] < 0
    operands, options = tensors(call)
    by_hand = BY_HAND[form](torch.tensor(call.dout), **operands, **options)._asdict()
    for actual in (results(FORWARD[form], call), by_hand):
        for gradient in ("dk", "dv"):
            assert (actual[gradient][:, padding] == 0).all()
            assert actual[gradient][:, ~padding].isnan().all()


@pytest.mark.parametrize("axis", ["B", "Q", "K", "H", "Q K", "all"])
@every_form
def test_empty_axes(draw_sequence, forward, axis):
    """SEQ-10."""
    emptied = {"H": ("G", "H"), "Q K": ("Q", "K"), "all": tuple("BQKHG")}.get(axis, (axis,))
    shape = SequenceShape(**(vars(SMALL) | dict.fromkeys(emptied, 0)))
    call = draw_sequence(shape, "everything", seed=20)
    actual = results(forward, call)
    for name, x in call.operands.items():
        assert actual[f"d{name}"].shape == x.shape and (actual[f"d{name}"] == 0).all()
    assert actual["out"].shape == shape.of("out") and (actual["out"] == 0).all()
    assert actual["lse"].shape == shape.of("lse") and (actual["lse"] == -np.inf).all()


# --- derivatives ---


@pytest.mark.parametrize("variant", ["causal", "everything"])
@every_form
def test_first_and_second_derivatives(draw_sequence, forward, variant):
    """SEQ-8, by finite differences; lse can be differentiated too."""
    call = draw_sequence(SequenceShape(1, 4, 4, 2, 1, 2), variant, seed=3)
    operands, options = tensors(call)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse = forward(q, k, v, **options, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert gradcheck(both, tuple(operands.values()))
    assert gradgradcheck(lambda *x: both(*x)[0], tuple(operands.values()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("form", ["plain", "tiled"])
def test_results_are_rounded_once(draw_sequence, form, dtype):
    """SEQ-7: half a unit in the last place, and float32's own error."""
    narrow = getattr(torch, dtype)
    call = draw_sequence(SequenceShape(1, 65, 65, 4, 2, 16), "packed", seed=4)
    rounded = {name: torch.tensor(x, dtype=narrow) for name, x in call.operands.items()}
    dout = torch.tensor(call.dout, dtype=narrow)
    lifted = replace(
        call,
        operands={name: x.double().numpy() for name, x in rounded.items()},
        dout=dout.double().numpy(),
    )
    expected = wanted(lifted)
    actual = results(FORWARD[form], lifted, narrow)
    by_hand = BY_HAND[form](dout, **rounded, **tensors(call)[1])._asdict()
    unit = torch.finfo(narrow).eps
    for found in (actual, by_hand):
        for name, x in found.items():
            wide = torch.promote_types(narrow, torch.float32)
            assert x.dtype == (wide if name == "lse" else narrow)
            u = torch.finfo(wide).eps if name == "lse" else unit
            size = np.abs(expected[name]).max()
            error = np.abs(x.double().numpy() - expected[name]).max()
            assert error <= (u / 2 + 1e-6 * (dtype != "float64")) * size + 1e-13, name


@pytest.mark.parametrize(("attend", "differentiate"), BLOCKS.values(), ids=list(BLOCKS))
def test_blocks_are_not_yet_rounded(draw_sequence, attend, differentiate):
    """SEQ-11."""
    call = draw_sequence(SMALL, "packed", seed=25)
    operands, options = tensors(call, torch.bfloat16)
    with torch.no_grad():
        out, lse = attend(**operands, **options)
        dout = torch.tensor(call.dout, dtype=torch.bfloat16)
        delta = forms.attention_delta(dout, out)
        gradients = differentiate(dout, **operands, lse=lse, delta=delta, **options)
        whole = forms.attention(**operands, **options)
        wider = differentiate(dout, **operands, lse=lse.double(), delta=delta.double(), **options)
    assert {x.dtype for x in (out, lse, delta, *gradients, *wider)} == {torch.float32}
    assert torch.equal(out.to(torch.bfloat16), whole) and not torch.equal(out, whole.float())


class Largest(TorchDispatchMode):
    """Sees the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("name", sorted(n for n in NAMES if n.endswith("tiled")))
def test_tiles_hold_nothing_of_size_q_k(draw_sequence, name):
    """No L × L memory, not even of the mask, forward and backward."""
    call = draw_sequence(SequenceShape(1, 256, 256, 1, 1, 4), "packed", seed=30)
    operands, options = tensors(call)
    options["block_q"] = 8
    function = getattr(forms, name)
    statistics = {n: torch.zeros(call.shape.of("lse")).double() for n in ("lse", "delta")}
    with Largest() as seen:
        if name == "attention_tiled":
            function(**operands, **options).sum().backward()
        else:
            dout = {"dout": torch.tensor(call.dout)} if "backward" in name else {}
            more = statistics if "block_backward" in name else {}
            with torch.no_grad():
                function(**dout, **operands, **more, **options)
    assert 0 < seen.numel <= 8 * 256


# --- wrong calls ---


def test_wrong_calls_are_refused_at_every_door(draw_sequence):
    """SEQ-12."""
    call = draw_sequence(SMALL, "everything", seed=32)
    operands, options = tensors(call)
    zeros = torch.zeros(call.shape.of("lse"), dtype=torch.float64)
    for name in sorted(set(NAMES) - {"AttentionGradients", "attention_delta", "merge"}):
        function = getattr(forms, name)
        given: dict[str, Any] = {**operands, **options}
        if "backward" in name:
            given["dout"] = torch.tensor(call.dout)
        if "block_backward" in name:
            given |= {"lse": zeros, "delta": zeros}
        function(**given)
        with pytest.raises(ValueError, match="v must have K=7 on axis 1"):
            function(**given | {"v": operands["v"][:, :-1]})
        with pytest.raises(TypeError, match="positions must be int32 or int64, got float32"):
            function(**given | {"positions": torch.arange(7.0)})
        with pytest.raises(ValueError, match="window must not be below -1"):
            function(**given | {"window": -3})
        if "backward" in name:
            dout = given["dout"]
            with pytest.raises(ValueError, match=r"dout must have the shape of q \(2, 7, 4, 3\)"):
                function(**given | {"dout": dout[:, :-1]})
            with pytest.raises(TypeError, match="dout must be float64, the dtype of q, got float"):
                function(**given | {"dout": dout.float()})
            with pytest.raises(TypeError, match="dout must be an array, got list"):
                function(**given | {"dout": dout.tolist()})
        if "block_backward" in name:
            for other in ("lse", "delta"):
                with pytest.raises(ValueError, match=rf"{other} must be \[B, H, Q\] of q"):
                    function(**given | {other: zeros.transpose(1, 2)})
                with pytest.raises(TypeError, match=f"{other} must be float64 or wider, got float"):
                    function(**given | {other: zeros.float()})
                with pytest.raises(TypeError, match=f"{other} must be an array, got list"):
                    function(**given | {other: zeros.tolist()})
        if "tiled" in name:
            with pytest.raises(ValueError, match="block_q must be at least 1, got 0"):
                function(**given, block_q=0)


def test_delta_of_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"dout must have the shape of out \(1, 2, 3, 4\)"):
        forms.attention_delta(torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 4))
