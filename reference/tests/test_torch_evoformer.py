"""The PyTorch form against the oracle, and its first and second derivatives against differences."""

from __future__ import annotations

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
from isoform.reference.contract import DIFFERENTIABLE, Shape
from isoform.reference.torch import evoformer_attention, evoformer_attention_tiled, merge

FORMS: dict[str, Any] = {
    "plain": evoformer_attention,
    "tiled": lambda *args, **options: evoformer_attention_tiled(*args, **options, block_q=2),
}
SMALL = Shape(B=1, S=2, Q=5, K=7, H=4, G=2, D=3)

every_form = pytest.mark.parametrize("forward", FORMS.values(), ids=list(FORMS))
same_examples = settings(deadline=None, derandomize=True, max_examples=120)


def tensors(operands: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The operands as leaves that want a gradient, in ``dtype``; the mask as it is."""
    return {
        name: torch.tensor(x, dtype=torch.bool if name == "mask" else dtype).requires_grad_(
            name != "mask"
        )
        for name, x in operands.items()
    }


def results(
    forward: Any, operands: dict[str, Tensor], dout: Any, **options: Any
) -> dict[str, Tensor]:
    """out, lse and the gradients by name."""
    out, lse = forward(**operands, return_lse=True, **options)
    wanted = {name: x for name, x in operands.items() if x.requires_grad}
    found = torch.autograd.grad(out, list(wanted.values()), torch.as_tensor(dout, dtype=out.dtype))
    gradients = {f"d{name}": x for name, x in zip(wanted, found, strict=True)}
    return {"out": out.detach(), "lse": lse.detach()} | gradients


def wanted(operands: Any, dout: Any, **options: Any) -> dict[str, Any]:
    """The oracle's results by the same names."""
    out, lse = oracle.evoformer_attention(**operands, return_lse=True, **options)
    gradients = oracle.evoformer_attention_backward(dout, **operands, **options)._asdict()
    return {"out": out, "lse": lse} | {n: x for n, x in gradients.items() if x is not None}


# --- against the oracle ---


@same_examples
@given(data=st.data())
def test_equal_to_the_oracle(problems, relative_error, data):
    """EVO-1 to EVO-5 and EVO-10, over random shapes, edges included, in tiles of any size too."""
    _, operands, dout = data.draw(problems(spreads=(1.0, 4.0)))
    options = {"scale": data.draw(st.sampled_from([None, 0.7, -0.2]), label="scale")}
    expected = wanted(operands, dout, **options)
    block_q = data.draw(st.integers(1, 7), label="block_q")
    # Where p is near 1, ds is the difference of two numbers of the size of dp: that sets the scale.
    size = float(np.abs(dout).sum() * np.nan_to_num(np.abs(operands["q"])).max(initial=1))
    for form, extra in (
        (evoformer_attention, {}),
        (evoformer_attention_tiled, {"block_q": block_q}),
    ):
        actual = results(form, tensors(operands), dout, **options, **extra)
        assert actual.keys() == expected.keys()
        for name, x in actual.items():
            error = relative_error(x.numpy(), expected[name])
            assert error <= 1e-13 or error * np.abs(expected[name]).max() <= 1e-14 * size, name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "mask_bias", "pair_bias", "gate", "dout"])
@every_form
def test_what_is_not_finite_goes_the_same_way_as_in_the_oracle(
    draw, relative_error, forward, name, bad
):
    """EVO-9."""
    _, operands, dout = draw(Shape(1, 2, 5, 3, 2, 1, 2), seed=2)
    operands["mask"][:] = True
    (operands | {"dout": dout})[name].flat[1] = bad
    expected = wanted(operands, dout)
    actual = results(forward, tensors(operands), dout)
    for result, x in actual.items():
        assert relative_error(x.numpy(), expected[result]) <= 1e-14


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_form
def test_dropped_keys_have_exactly_zero_gradient(draw, forward, bad):
    """EVO-4: and out, lse and all other gradients are bitwise those of harmless padding."""
    _, operands, dout = draw(SMALL, seed=5)
    operands["mask"][:, :, 2] = False
    dropped = ~operands["mask"]
    expected = results(forward, tensors(operands), dout)
    operands["k"][dropped] = operands["v"][dropped] = bad
    operands["mask_bias"][:, :, 0, 0][dropped] = bad
    operands["pair_bias"][..., 2] = bad
    actual = results(forward, tensors(operands), dout)
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name
    for name in ("dk", "dv"):
        assert (actual[name].numpy()[dropped] == 0).all()
    assert (actual["dmask_bias"].numpy()[:, :, 0, 0][dropped] == 0).all()
    assert (actual["dpair_bias"][..., 2] == 0).all()


@every_form
def test_a_dropped_key_has_zero_gradient_beside_nan(draw, forward):
    """EVO-4 before EVO-9: NaN in q spoils its row's attended keys, never the dropped ones."""
    _, operands, dout = draw(SMALL, seed=6)
    operands["mask"][:, :, 2] = False
    operands["q"][:, 0, 1] = np.nan
    actual = results(forward, tensors(operands), dout)
    for name in ("dk", "dv"):
        assert (actual[name][:, :, 2] == 0).all() and actual[name][:, 0].isnan().any()
    assert (actual["dmask_bias"][..., 2] == 0).all()
    assert (actual["dpair_bias"][..., 2] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["gate", "dout", "v"])
@every_form
def test_nothing_passes_through_a_query_with_no_key_left(draw, forward, name, bad):
    """EVO-5: neither NaN in its gate or its cotangent, nor what values hold, reaches anything."""
    _, operands, dout = draw(SMALL, ["pair_bias", "mask", "gate"], seed=8)
    operands["mask"][:] = True
    operands["mask"][:, 0] = False
    if name == "v":  # for all queries, or the living ones would see it
        operands["pair_bias"][:] = -np.inf
    else:
        operands["pair_bias"][:, :, :, 1] = -np.inf
    expected = results(forward, tensors(operands), dout)
    everything = operands | {"dout": dout}
    everything[name][:, 0] = bad
    everything[name][:, :, 1] = bad
    actual = results(forward, tensors(operands), dout)
    for result, x in actual.items():
        assert torch.equal(x, expected[result]), result


@every_form
def test_a_large_finite_bias_is_a_number(draw, forward):
    """EVO-6: −1e4 on every key cancels in float32 too, as far as float32 holds the sum."""
    _, operands, dout = draw(SMALL, ["mask_bias", "pair_bias"], seed=10)
    expected = wanted(operands, dout)
    for name in ("mask_bias", "pair_bias"):
        shifted = operands | {name: operands[name] - 1e4}
        actual = results(forward, tensors(shifted, torch.float32), dout)
        np.testing.assert_allclose(actual["lse"], expected["lse"] - 1e4, rtol=1e-6)
        for result in ("out", "dq", "dk", "dv", "dmask_bias", "dpair_bias"):
            np.testing.assert_allclose(actual[result], expected[result], atol=2e-2)
            assert np.abs(expected[result]).max() > 0.2


# --- derivatives against differences ---


def checked(
    draw: Any, forward: Any, shape: Shape, optional: list[str], **hard: bool
) -> tuple[Any, tuple[Tensor, ...]]:
    """A function of the differentiable operands alone, and their values."""
    _, operands, _ = draw(shape, optional, seed=shape.K, **hard)
    values = tensors(operands)
    if hard:  # a bias of −inf cannot be moved by a difference: it is a constant here
        values = {
            name: x.detach() if "bias" in name or name == "mask" else x
            for name, x in values.items()
        }
    names = [name for name in DIFFERENTIABLE if name in values and values[name].requires_grad]

    def function(*moved: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = forward(**values | dict(zip(names, moved, strict=True)), return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)  # −inf − −inf is no difference

    return function, tuple(values[name] for name in names)


GRADIENT_CASES = {
    "plain": (Shape(1, 2, 2, 3, 2, 2, 2), [], {}),
    "grouped": (Shape(1, 1, 2, 3, 4, 2, 2), ["gate"], {}),
    "one-group": (Shape(1, 1, 3, 2, 3, 1, 1), ["mask_bias"], {}),
    "everything": (Shape(1, 2, 3, 4, 2, 1, 2), ["mask", "mask_bias", "pair_bias", "gate"], {}),
    "dead": (Shape(1, 2, 3, 4, 2, 1, 2), ["mask", "pair_bias", "gate"], {"dead": True}),
    "infinite": (
        Shape(1, 2, 2, 4, 2, 1, 2),
        ["mask", "mask_bias", "pair_bias", "gate"],
        {"dead": True, "infinite": True},
    ),
}
gradient_cases = pytest.mark.parametrize(
    ("shape", "optional", "hard"), GRADIENT_CASES.values(), ids=list(GRADIENT_CASES)
)


@gradient_cases
@every_form
def test_first_derivatives(draw, forward, shape, optional, hard):
    """Of out and of lse, by every operand."""
    function, values = checked(draw, forward, shape, optional, **hard)
    assert gradcheck(function, values)


@gradient_cases
@every_form
def test_second_derivatives(draw, forward, shape, optional, hard):
    """Gradient penalties and Hessian-vector products go through."""
    function, values = checked(draw, forward, shape, optional, **hard)
    assert gradgradcheck(function, values, atol=1e-6)


# --- dtypes ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_form
def test_results_are_rounded_once(draw, forward, dtype):
    """EVO-7 and EVO-8: half a unit in the last place, and what float32 errs besides."""
    shape = Shape(1, 65, 9, 33, 4, 2, 16)
    _, operands, dout = draw(shape, seed=24, dead=True)
    values = tensors(operands, dtype)
    dout = torch.as_tensor(dout).to(dtype)
    actual = results(forward, values, dout)
    assert actual["lse"].dtype == torch.promote_types(dtype, torch.float32)
    exact = {name: x.detach().to(torch.float64).numpy() for name, x in values.items()}
    exact["mask"] = operands["mask"]
    expected = wanted(exact, dout.to(torch.float64).numpy())
    within = 1e-5 if dtype != torch.float64 else 1e-13
    for name, x in actual.items():
        if name != "lse":
            assert x.dtype == dtype
        want = np.where(np.isfinite(expected[name]), expected[name], 0)
        error = np.abs(np.where(np.isfinite(expected[name]), x.to(torch.float64), 0) - want)
        roundoff = torch.finfo(x.dtype).eps / 2
        smallest = torch.finfo(x.dtype).smallest_normal * roundoff
        allowed = roundoff * np.abs(want) + within * np.abs(want).max() + smallest
        assert (error <= allowed).all(), name


@every_form
def test_float16_does_not_overflow_inside(forward):
    """EVO-7: q·k is 2.5 million here, and float16 ends at 65504."""
    shape = Shape(1, 1, 2, 3, 1, 1, 64)
    q, k = (torch.full(shape.of(name), 200, dtype=torch.float16) for name in "qk")
    v = torch.arange(3 * 64, dtype=torch.float16).reshape(shape.of("v"))
    out, lse = forward(q, k, v, return_lse=True)
    torch.testing.assert_close(out[0, 0, 0, 0], v[0, 0].float().mean((0, 1)).half(), rtol=0, atol=0)
    np.testing.assert_allclose(lse, 200 * 200 * 8 + np.log(3), rtol=1e-6)


# --- layouts, devices, wrong calls ---


@every_form
def test_expanded_operands(draw, forward):
    """EVO-10: stride 0; the gradient of what was expanded is summed by autograd."""
    _, operands, dout = draw(SMALL, seed=22)
    values = tensors(operands)
    stored = {name: x[:, :1].detach().requires_grad_(name != "mask") for name, x in values.items()}
    stored["gate"] = values["gate"][..., :1].detach().requires_grad_()
    seen = {name: x.expand(values[name].shape) for name, x in stored.items()}
    copies = {
        name: x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(name != "mask")
        for name, x in seen.items()
    }
    assert seen["k"].stride()[1] == seen["gate"].stride()[4] == 0
    expected = results(forward, copies, dout)
    out = forward(**seen)
    torch.testing.assert_close(out, expected["out"], rtol=1e-13, atol=1e-13)
    out.backward(torch.as_tensor(dout))
    for name, x in stored.items():
        if x.requires_grad:
            axes = [axis for axis in range(x.ndim) if x.shape[axis] != values[name].shape[axis]]
            summed = expected[f"d{name}"].sum(axes, keepdim=True) if axes else expected[f"d{name}"]
            torch.testing.assert_close(x.grad, summed, rtol=1e-12, atol=1e-12)


@every_form
def test_transposed_and_sliced_operands(draw, forward):
    """EVO-10."""
    _, operands, dout = draw(SMALL, seed=21)
    values = tensors(operands)
    expected = results(forward, values, dout)
    moved = {
        name: torch.stack([x.detach(), x.detach()], -1).swapaxes(0, -2).contiguous().swapaxes(0, -2)
        for name, x in values.items()
    }
    views = {name: x[..., 0].requires_grad_(name != "mask") for name, x in moved.items()}
    assert not any(x.is_contiguous() for x in views.values())
    actual = results(forward, views, dout)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-13, atol=1e-13)


@every_form
def test_inputs_are_never_written(draw, forward):
    """EVO-10: by forward and backward."""
    _, operands, dout = draw(SMALL, seed=23, dead=True, infinite=True, garbage=True)
    values = tensors(operands)
    results(forward, values, dout)
    for name, x in values.items():
        np.testing.assert_array_equal(x.detach().numpy(), operands[name])
        assert x._version == 0


@every_form
def test_equal_calls_have_equal_results(draw, forward):
    """EVO-13: bit by bit, gradients included."""
    _, operands, dout = draw(Shape(2, 3, 33, 47, 4, 2, 16), seed=29)
    first, again = (results(forward, tensors(operands), dout) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@every_form
def test_without_gradients_nothing_is_recorded(draw, forward):
    _, operands, _ = draw(SMALL, seed=33)
    values = tensors(operands)
    with torch.no_grad():
        assert forward(**values).grad_fn is None
    assert forward(**values).grad_fn is not None


@every_form
def test_operands_share_a_device(draw, forward):
    """EVO-1 and EVO-12: no copy from one device to another behind the caller's back."""
    _, operands, _ = draw(SMALL, seed=30)
    values = tensors(operands)
    for name in values:
        if name != "q":
            elsewhere = values | {name: values[name].to("meta")}
            with pytest.raises(ValueError, match=f"^{name} is on meta, but q is on cpu$"):
                forward(**elsewhere)


@every_form
def test_shapes_alone_are_enough_on_the_meta_device(draw, forward):
    """EVO-1: all on one device that holds no numbers."""
    shape, operands, _ = draw(SMALL, seed=30)
    moved = {name: x.to("meta") for name, x in tensors(operands).items()}
    out, lse = forward(**moved, return_lse=True)
    assert out.shape == shape.of("out") and lse.shape == shape.of("lse")
    assert out.device.type == lse.device.type == "meta"


@every_form
def test_wrong_calls_are_refused(draw, forward):
    """EVO-12: the contract's checks stand here too."""
    _, operands, _ = draw(SMALL, seed=30)
    values = tensors(operands)
    with pytest.raises(ValueError, match="gate must have Q=5 on axis 2"):
        forward(**values | {"gate": values["gate"][:, :, :-1]})
    with pytest.raises(TypeError, match="v must be float64, the dtype of q, got float32"):
        forward(**values | {"v": values["v"].float()})
    with pytest.raises(
        TypeError, match="q must be one of float16, bfloat16, float32, float64, got"
    ):
        forward(**values | {"q": values["q"].to(torch.complex128)})
    with pytest.raises(ValueError, match="scale must be finite"):
        forward(**values, scale=float("inf"))


@pytest.mark.parametrize("size", [0, -1])
def test_a_block_holds_something(draw, size):
    """EVO-12."""
    _, operands, _ = draw(SMALL)
    with pytest.raises(ValueError, match=f"block_q must be at least 1, got {size}"):
        evoformer_attention_tiled(**tensors(operands), block_q=size)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, forward or backward, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return made


def test_tiles_hold_one_block_of_logits(draw):
    """Nothing larger than B·S·H·block_q·K is made, forward or backward; plain makes Q·K."""
    shape = Shape(1, 1, 96, 96, 2, 2, 4)
    _, operands, dout = draw(shape, ["mask", "mask_bias", "gate"])
    found = {}
    for name, form in {"plain": evoformer_attention, "tiled": FORMS["tiled"]}.items():
        with Largest() as largest:
            results(form, tensors(operands), dout)
        found[name] = largest.numbers
    assert found["plain"] == shape.logits
    assert found["tiled"] == max(2 * 2 * 96, shape.Q * shape.H * shape.D)


# --- merge ---


def halves(operands: dict[str, Tensor], cut: int) -> list[Any]:
    """out and lse over the keys before and after ``cut``."""
    found = []
    for some in (slice(None, cut), slice(cut, None)):
        part = {
            name: x[:, :, some]
            if name in ("k", "v", "mask")
            else x[..., some]
            if "bias" in name
            else x
            for name, x in operands.items()
        }
        found.append(evoformer_attention(**part, return_lse=True))
    return found


@same_examples
@given(data=st.data())
def test_merged_parts_are_the_whole(problems, relative_error, data):
    """EVO-11: as the oracle merges, and gradients through the merge are those of the whole."""
    _, operands, dout = data.draw(
        problems(optional=["mask", "mask_bias", "pair_bias"], spreads=(1.0,))
    )
    cut = data.draw(st.integers(0, operands["k"].shape[2]), label="cut")
    expected = wanted(operands, dout)

    def merged(return_lse: bool, **values: Tensor) -> Any:
        a, b = halves(values, cut)
        return merge(*a, *b)

    actual = results(merged, tensors(operands), dout)
    for name, x in actual.items():
        error = relative_error(x.numpy(), expected[name])
        assert error <= 1e-13 or error * np.abs(expected[name]).max() <= 1e-14, name


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3.0])
def test_a_side_without_keys_is_the_identity(draw, bad):
    """EVO-11: exactly, whatever its out holds, and the gradients know nothing of it either."""
    _, operands, dout = draw(SMALL, ["pair_bias"], seed=4)
    out, lse = evoformer_attention(**tensors(operands), return_lse=True)
    for order in (1, -1):
        mine = [x.detach().requires_grad_() for x in (out, lse)]
        dead = [
            torch.full_like(out, bad).requires_grad_(),
            torch.full_like(lse, -torch.inf).requires_grad_(),
        ]
        sides = [mine, dead][::order]
        merged, merged_lse = merge(*sides[0], *sides[1])
        assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
        gradients = torch.autograd.grad(
            (merged, merged_lse),
            (*mine, *dead),
            (torch.as_tensor(dout), torch.ones_like(merged_lse)),
        )
        torch.testing.assert_close(gradients[0], torch.as_tensor(dout), rtol=0, atol=0)
        torch.testing.assert_close(gradients[1], torch.ones_like(lse), rtol=1e-12, atol=1e-12)
        assert (gradients[2] == 0).all() and (gradients[3] == 0).all()


def test_merging_is_differentiable_twice(draw):
    _, operands, _ = draw(Shape(1, 1, 2, 5, 2, 1, 2), [], seed=5)
    (a, lse_a), (b, lse_b) = halves(tensors(operands), 2)
    values = tuple(x.detach().requires_grad_() for x in (a, lse_a, b, lse_b))
    assert gradcheck(merge, values)
    assert gradgradcheck(merge, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_never_overflows(dtype):
    """EVO-11."""
    huge = torch.finfo(dtype).max
    levels = [-huge, -1e4, -800.0, 0.0, 800.0, 1e4, huge]
    for a in levels:
        for b in levels:
            sides = [torch.full((1, 1, 1), x, dtype=dtype) for x in (2.0, 6.0)]
            out, lse = merge(sides[0], torch.full((1, 1), a, dtype=dtype),
                             sides[1], torch.full((1, 1), b, dtype=dtype))  # fmt: skip
            assert out.item() == (4.0 if a == b else 2.0 if a > b else 6.0)
            np.testing.assert_allclose(lse.item(), max(a, b) + np.log(2) * (a == b), rtol=1e-6)


def test_a_share_that_underflows_is_not_without_keys():
    """EVO-11 and EVO-9: as in attention over all keys, 0 times NaN is NaN."""
    out, lse = merge(
        torch.ones(1, 1, 1),
        torch.zeros(1, 1),
        torch.full((1, 1, 1), torch.nan),
        torch.full((1, 1), -2000.0),
    )
    assert out.isnan().item() and lse.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_merged_dtypes_are_those_of_the_sides(draw, dtype):
    """EVO-7 and EVO-11."""
    _, operands, _ = draw(SMALL, ["mask"], seed=5)
    values = {name: x.detach() for name, x in tensors(operands, dtype).items()}
    whole, whole_lse = evoformer_attention(**values, return_lse=True)
    a, b = halves(values, 3)
    out, lse = merge(*a, *b)
    assert out.dtype == whole.dtype and lse.dtype == whole_lse.dtype
    roundoff = torch.finfo(dtype).eps
    torch.testing.assert_close(out, whole, rtol=2 * roundoff, atol=2 * roundoff)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("out_b", "lse_a", "lse_b", "message"),
    [
        ((2, 5, 4, 2), (2, 4, 5), (2, 4, 5), "both sides must have equal shapes"),
        ((2, 5, 4, 3), (2, 4, 5), (2, 4, 1), "both sides must have equal shapes"),
        ((2, 5, 4, 3), (2, 5, 4), (2, 5, 4), r"lse must be \[..., H, Q\] of out \(2, 5, 4, 3\)"),
    ],
)
def test_sides_that_do_not_fit_are_refused(out_b, lse_a, lse_b, message):
    """EVO-12."""
    with pytest.raises(ValueError, match=message):
        merge(torch.zeros(2, 5, 4, 3), torch.zeros(lse_a), torch.zeros(out_b), torch.zeros(lse_b))
