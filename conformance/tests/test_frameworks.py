"""NumPy and PyTorch behind the same functions: nothing is lost on the way in or out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from isoform.conformance.dtypes import FORMATS, Array
from isoform.conformance.evoformer.values import LAYOUTS, draw
from isoform.conformance.frameworks import Framework, framework
from isoform.conformance.implementation import Implementation
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.rotary.values import draw as draw_rotary
from isoform.reference.contract import Capabilities, Unsupported, dtype_name, evoformer_call

NAME = "evoformer_attention"
MIB = 2**20


@pytest.fixture(params=["numpy", "torch"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def library(name: str) -> Framework:
    return framework(name)


def made(
    forward: Callable[..., Any],
    *,
    name: str = "numpy",
    backward: Callable[..., Any] | None = None,
) -> Implementation:
    return Implementation("made-up", name, Capabilities(NAME), forward, backward)


def is_same(x: Array, y: Array) -> bool:
    """The same bits, but for the payload of NaN."""
    return (x.dtype, x.shape) == (y.dtype, y.shape) and bool(
        np.all((x == y) | ((x != x) & (y != y)))
    )


# In and out


@pytest.mark.parametrize("dtype", FORMATS)
def test_numbers_and_dtypes_are_kept(library: Framework, dtype: str) -> None:
    float_format = FORMATS[dtype]
    numbers = [
        0.0,
        -0.0,
        1 / 3,
        float_format.largest,
        float_format.smallest,
        np.nan,
        np.inf,
        -np.inf,
    ]
    x = np.array(numbers).astype(float_format.dtype).reshape(2, 4)
    mask = np.array([[True, False], [False, True]])
    uploaded = library.upload({"q": x, "mask": mask}, "cpu")
    assert dtype_name(uploaded["q"]) == dtype
    assert dtype_name(uploaded["mask"]) == "bool"
    back = {name: library.download(given) for name, given in uploaded.items()}
    assert is_same(back["q"], x)
    assert (np.signbit(back["q"][0, :2]) == [False, True]).all()
    assert is_same(back["mask"], mask)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"contiguous"}))
def test_strides_are_kept(library: Framework, layout: str, dtype: str) -> None:
    operands = draw(CASES[f"evoformer/layout/{dtype}/{layout}"])
    for name, x in library.upload(operands, "cpu").items():
        given = operands[name]
        assert tuple(x.shape) == given.shape
        strides = x.strides if isinstance(x, np.ndarray) else [n * x.itemsize for n in x.stride()]
        assert tuple(strides) == given.strides
        assert is_same(library.download(x), given)


def test_empty_axes_are_kept(library: Framework) -> None:
    for case in CASES.values():
        if "empty" in case.tags:
            operands = OPERATIONS[case.operation].draw(case)
            for name, x in library.upload(operands, "cpu").items():
                assert is_same(library.download(x), operands[name])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_downloads_are_copies(library: Framework, dtype: str) -> None:
    operands = draw(CASES[f"evoformer/operands/{dtype}/mask"])
    uploaded = library.upload(operands, "cpu")
    before = library.download(uploaded["q"])
    uploaded["q"][...] = 7
    assert is_same(before, draw(CASES[f"evoformer/operands/{dtype}/mask"])["q"])
    assert (library.download(uploaded["q"]) == 7).all()
    before[...] = 8
    assert (library.download(uploaded["q"]) == 7).all()


def test_results_that_carry_gradients_are_downloaded_too() -> None:
    x = torch.ones(2, 3, requires_grad=True) * 2
    assert (framework("torch").download(x) == 2).all()
    assert (framework("torch").download(x.to(torch.bfloat16).mT) == 2).all()


def test_devices(library: Framework) -> None:
    assert library.devices()[0] == "cpu"
    assert ("cuda" in framework("torch").devices()) == torch.cuda.is_available()
    assert framework("numpy").devices() == ("cpu",)


# What spoils a call


@pytest.mark.parametrize("dtype", ["float32", "float64", "bool"])
def test_another_dtype_is_another_float_dtype(library: Framework, dtype: str) -> None:
    x = library.upload({"x": np.ones((2, 3), dtype)}, "cpu")["x"]
    other = library.other_dtype(x)
    assert dtype_name(other) != dtype
    assert dtype_name(other) in FORMATS
    assert tuple(other.shape) == (2, 3)


def test_another_device_is_refused_by_the_contract_for_that_alone(library: Framework) -> None:
    operands = library.upload(draw(CASES["evoformer/operands/fp32/bare"]), "cpu")
    operands.pop("dout")
    evoformer_call(**operands)
    with pytest.raises(ValueError, match=r"k is on (cuda:0|meta), but q is on cpu"):
        evoformer_call(**operands | {"k": library.other_device(operands["k"])})


# Running


def test_only_what_is_used_is_passed(name: str, library: Framework) -> None:
    seen: list[set[str]] = []

    def forward(q: Any, k: Any, v: Any, **more: Any) -> Any:
        seen.append(set(more))
        return (q, q[..., 0]) if more.get("return_lse") else q

    implementation = made(forward, name=name)
    operands = library.upload(draw(CASES["evoformer/operands/fp32/mask+gate"]), "cpu")
    plain = library.run(implementation, operands, {}, lse=False, gradients=[])
    assert plain.keys() == {"out"}
    both = library.run(implementation, operands, {"scale": 0.0}, lse=True, gradients=[])
    assert both.keys() == {"out", "lse"}
    assert seen == [{"mask", "gate"}, {"mask", "gate", "scale", "return_lse"}]
    assert is_same(library.download(both["lse"]), library.download(operands["q"])[..., 0])


@pytest.mark.parametrize("returned", [lambda q: q, lambda q: (q,), lambda q: (q, q, q)])
def test_lse_must_be_returned_where_it_is_asked_for(
    name: str, library: Framework, returned: Callable[[Any], Any]
) -> None:
    implementation = made(lambda q, k, v, return_lse: returned(q), name=name)
    operands = library.upload(draw(CASES["evoformer/operands/fp32/bare"]), "cpu")
    with pytest.raises(TypeError, match=r"\(out, lse\) must be returned"):
        library.run(implementation, operands, {}, lse=True, gradients=[])


@pytest.mark.parametrize("returned", [None, "out", [1.0], np.ones(3)])
def test_torch_must_return_tensors(returned: Any) -> None:
    library = framework("torch")
    operands = library.upload(draw(CASES["evoformer/operands/fp32/bare"]), "cpu")
    for forward, lse, result in (
        (lambda q, k, v: returned, False, "out"),
        (lambda q, k, v, return_lse: (q, returned), True, "lse"),
    ):
        with pytest.raises(TypeError, match=f"{result} must be a tensor"):
            library.run(made(forward, name="torch"), operands, {}, lse=lse, gradients=[])


# Gradients


def test_own_backward_by_attribute_or_in_the_order_of_the_contract(
    name: str, library: Framework
) -> None:
    operands = library.upload(draw(CASES["evoformer/operands/fp32/gate"]), "cpu")
    calls: list[set[str]] = []

    def by_attribute(dout: Any, q: Any, k: Any, v: Any, **more: Any) -> Any:
        calls.append(set(more))
        return SimpleNamespace(dq=dout, dk=2 * k, dv=3 * v, dgate=4 * more["gate"])

    def in_order(dout: Any, q: Any, k: Any, v: Any, **more: Any) -> Any:
        return dout, 2 * k, 3 * v, None, None, 4 * more["gate"]

    expected = {
        "dq": operands["dout"],
        "dk": 2 * operands["k"],
        "dv": 3 * operands["v"],
        "dgate": 4 * operands["gate"],
    }
    for backward in (by_attribute, in_order):
        implementation = made(lambda q, k, v, **more: q, name=name, backward=backward)
        wanted = ["q", "k", "v", "gate"]
        results = library.run(implementation, operands, {"scale": 1.0}, lse=False, gradients=wanted)
        assert results.keys() == {"out", *expected}
        for result, x in expected.items():
            assert is_same(library.download(results[result]), library.download(x))
        some = library.run(implementation, operands, {"scale": 1.0}, lse=False, gradients=["v"])
        assert some.keys() == {"out", "dv"}
    assert calls == [{"gate", "scale"}] * 2


def test_a_backward_is_called_only_if_gradients_are_wanted(name: str, library: Framework) -> None:
    def backward(*given: Any, **more: Any) -> Any:
        raise AssertionError("not wanted")

    operands = library.upload(draw(CASES["evoformer/operands/fp32/bare"]), "cpu")
    implementation = made(lambda q, k, v: q, name=name, backward=backward)
    results = library.run(implementation, operands, {}, lse=False, gradients=[])
    assert results.keys() == {"out"}


def test_without_a_backward_numpy_declines_gradients() -> None:
    library = framework("numpy")
    operands = draw(CASES["evoformer/operands/fp32/bare"])
    with pytest.raises(Unsupported) as raised:
        library.run(made(lambda q, k, v: q), operands, {}, lse=False, gradients=["q", "v"])
    assert raised.value.reasons == ("gradient of q", "gradient of v")


def test_autograd_gives_the_gradients_that_are_wanted() -> None:
    library = framework("torch")
    operands = library.upload(draw(CASES["evoformer/operands/fp32/mask+gate"]), "cpu")

    def forward(q: Any, k: Any, v: Any, mask: Any, gate: Any) -> Any:
        assert q.requires_grad
        assert not v.requires_grad
        assert torch.is_grad_enabled()
        return q * gate

    results = library.run(
        made(forward, name="torch"), operands, {}, lse=False, gradients=["q", "gate"]
    )
    assert results.keys() == {"out", "dq", "dgate"}
    torch.testing.assert_close(results["dq"], operands["dout"] * operands["gate"])
    torch.testing.assert_close(results["dgate"], operands["dout"] * operands["q"])
    assert not any(x.requires_grad for x in operands.values())
    assert all(x.grad is None for x in operands.values())


def test_without_gradients_autograd_is_off() -> None:
    library = framework("torch")
    operands = library.upload(draw(CASES["evoformer/operands/fp32/bare"]), "cpu")

    def forward(q: Any, k: Any, v: Any) -> Any:
        assert not torch.is_grad_enabled()
        return q * 2

    results = library.run(made(forward, name="torch"), operands, {}, lse=False, gradients=[])
    assert not results["out"].requires_grad


def test_the_gradient_of_an_operand_that_is_not_used_is_zero() -> None:
    library = framework("torch")
    operands = library.upload(draw(CASES["evoformer/operands/bf16/gate"]), "cpu")
    results = library.run(
        made(lambda q, k, v, gate: q * 1, name="torch"),
        operands,
        {},
        lse=False,
        gradients=["q", "k", "gate"],
    )
    for name in ("k", "gate"):
        zeros = library.download(results[f"d{name}"])
        assert is_same(zeros, np.zeros(operands[name].shape, ml_dtypes.bfloat16))


# Memory


def test_peak_memory_is_what_is_held_at_once_at_most(name: str, library: Framework) -> None:
    def allocate(n: int) -> Any:
        return np.ones(n * MIB, np.uint8) if name == "numpy" else torch.ones(n * MIB // 4)

    kept = allocate(64)  # from before, which does not count

    def run() -> None:
        first = allocate(16)
        del first
        second = allocate(24)  # not 40: the first is gone
        third = allocate(8)
        del second, third
        allocate(4)

    peaks = [library.peak_memory(run, "cpu") for _ in range(2)]
    assert peaks == pytest.approx([32 * MIB] * 2, rel=0.1)
    assert library.peak_memory(lambda: None, "cpu") < MIB
    del kept


def test_peak_memory_passes_on_what_is_raised(library: Framework) -> None:
    def run() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        library.peak_memory(run, "cpu")
    assert library.peak_memory(lambda: None, "cpu") < MIB


def test_poison_leaves_operands_alone(library: Framework) -> None:
    operands = draw(CASES["evoformer/operands/bf16/mask+gate"])
    uploaded = library.upload(draw(CASES["evoformer/operands/bf16/mask+gate"]), "cpu")
    library.poison(uploaded)
    for name, x in uploaded.items():
        assert is_same(library.download(x), operands[name])


def test_without_pytorch_numpy_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert framework("numpy").devices() == ("cpu",)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        framework("torch")


# Another operation


def turning(backward: Any = None, *, name: str = "numpy") -> Implementation:
    capabilities = Capabilities("rotary_embedding", gradients=frozenset({"x"}), lse=False)
    return Implementation("made-up", name, capabilities, lambda x, positions: 2 * x, backward)


def test_a_single_gradient_may_be_returned_by_itself(name: str, library: Framework) -> None:
    operands = library.upload(draw_rotary(CASES["rotary/length-3/fp32/half"]), "cpu")
    seen: list[set[str]] = []

    def backward(dout: Any, **more: Any) -> Any:
        seen.append(set(more))
        return 3 * dout

    for returns in (backward, lambda dout, **more: (backward(dout, **more),)):
        found = library.run(turning(returns, name=name), operands, {}, lse=False, gradients=["x"])
        assert found.keys() == {"out", "dx"}
        assert is_same(library.download(found["dx"]), library.download(3 * operands["dout"]))
    assert seen == [{"positions"}] * 2  # x is not needed, and not given


def test_integers_have_no_gradient_and_are_not_poisoned(name: str, library: Framework) -> None:
    operands = library.upload(draw_rotary(CASES["rotary/positions/bf16/uint8"]), "cpu")
    before = library.download(operands["positions"])
    library.poison(operands)
    assert is_same(library.download(operands["positions"]), before)
    if name == "torch":
        found = library.run(turning(name=name), operands, {}, lse=False, gradients=["x"])
        assert is_same(library.download(found["dx"]), library.download(2 * operands["dout"]))
