"""Rotary embedding in PyTorch: the same numbers as the definition's, differentiable, compiled."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from isoform.reference import numpy as oracle
from isoform.reference.rotary_contract import LAYOUTS
from isoform.reference.rotary_scaling import DynamicNTK, Linear, Llama3, LongRoPE, YaRN
from isoform.reference.torch import (
    rotary_embedding,
    rotary_embedding_backward,
    rotary_tables,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POSITIONS = torch.tensor([0, 1, 2**16, 2**19, 2**20, 2**21 - 1, 2**21, -1, -(2**21)])
SCALINGS = {
    "none": None,
    "linear": Linear(8.0),
    "dynamic": DynamicNTK(4.0, 2048, 16384),
    "yarn": YaRN(4.0, 4096),
    "longrope": LongRoPE((1.0, 1.1, 2.0), (1.0, 2.0, 8.0), 4096, 131072, factor=32.0),
    "llama3": Llama3(),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def as_numpy(x: torch.Tensor) -> Any:
    """The same bits."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("d", [64, 80, 128])
def test_tables_are_those_of_the_definition(d: int, base: float) -> None:
    """Which is right to the last bit of float32: so must these be, but for a tie."""
    for ours, exact in zip(
        rotary_tables(POSITIONS, d, base=base),
        oracle.rotary_tables(POSITIONS.numpy(), d, base=base, dtype=np.float64),
        strict=True,
    ):
        spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        assert (np.abs(ours.double().numpy() - exact) <= 0.501 * spacing).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_against_the_definition(dtype: torch.dtype, layout: str, scaling: Any) -> None:
    x = normal(2, 9, 3, 8, dtype=dtype)
    options: dict[str, Any] = {"layout": layout, "scaling": scaling, "rotary_dim": 6, "base": 5e5}
    for ours, definition in (
        (rotary_embedding, oracle.rotary_embedding),
        (rotary_embedding_backward, oracle.rotary_embedding_backward),
    ):
        found = ours(x, POSITIONS, **options)
        wide = definition(as_numpy(x).astype(np.float64), POSITIONS.numpy(), **options)
        assert found.dtype == dtype
        assert found.shape == x.shape
        unit = torch.finfo(dtype).eps / 2
        wide_unit = min(unit, 2.0**-24)
        size = np.abs(as_numpy(x).astype(np.float64)).max()
        error = np.abs(found.double().numpy() - wide)
        assert (
            error <= unit * np.abs(wide) + 8 * wide_unit * size + 2.0**-25 * (unit > 1e-4)
        ).all()


def test_by_example_and_in_any_order() -> None:
    x = normal(2, 4, 2, 6)
    positions = torch.tensor([[7, 0, 2**20, 3], [-5, 1, 1, 2]])
    found = rotary_embedding(x, positions)
    np.testing.assert_allclose(
        found.numpy(), oracle.rotary_embedding(x.numpy(), positions.numpy()), rtol=0, atol=1e-15
    )
    for b in range(2):
        torch.testing.assert_close(
            found[b : b + 1], rotary_embedding(x[b : b + 1], positions[b]), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64],
)
def test_positions_of_every_integer_dtype(dtype: torch.dtype) -> None:
    x, positions = normal(1, 100, 2, 8), torch.arange(100)
    torch.testing.assert_close(
        rotary_embedding(x, positions.to(dtype)), rotary_embedding(x, positions), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_passes_through_keeps_its_bits(dtype: torch.dtype) -> None:
    x = normal(2, 5, 3, 9, dtype=dtype)
    x[..., 4:7] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    for found in (
        rotary_embedding(x, torch.arange(5), rotary_dim=4),
        rotary_embedding_backward(x, torch.arange(5), rotary_dim=4),
    ):
        assert (
            as_numpy(found[..., 4:].contiguous()).tobytes()
            == as_numpy(x[..., 4:].contiguous()).tobytes()
        )
        assert found[..., :4].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_axes(shape: tuple[int, ...], layout: str) -> None:
    x = torch.zeros(shape, requires_grad=True)
    out = rotary_embedding(x, torch.arange(shape[1]), layout=layout)
    assert out.shape == shape
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.shape == shape


def test_packed_projections_are_read_where_they_lie_and_left_alone() -> None:
    qkv = normal(2, 6, 3, 4, 8)
    before = qkv.clone()
    for x in qkv.unbind(2):
        out = rotary_embedding(x, torch.arange(6), layout="interleaved")
        torch.testing.assert_close(
            out,
            rotary_embedding(x.contiguous(), torch.arange(6), layout="interleaved"),
            rtol=0,
            atol=0,
        )
    assert torch.equal(qkv, before)
    one = normal(2, 6, 1, 8).expand(2, 6, 4, 8)  # stride 0
    out = rotary_embedding(one, torch.arange(6))
    assert torch.equal(out[:, :, 0], out[:, :, 3])


# Gradients (ROT-8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_gradients_of_gradients(layout: str, scaling: Any) -> None:
    x = normal(2, 3, 2, 7).requires_grad_()

    def turned(x: torch.Tensor) -> torch.Tensor:
        positions = torch.tensor([[0, 5, 2**21 - 1], [-7, 3, 2**19]])
        return rotary_embedding(x, positions, rotary_dim=6, layout=layout, scaling=scaling)

    assert torch.autograd.gradcheck(turned, (x,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(turned, (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autograd_gives_what_the_backward_gives(dtype: torch.dtype) -> None:
    x, dout = normal(2, 9, 3, 8, dtype=dtype), normal(2, 9, 3, 8, seed=1, dtype=dtype)
    x.requires_grad_()
    options: dict[str, Any] = {"rotary_dim": 6, "scaling": YaRN(4.0, 64)}
    out = rotary_embedding(x, POSITIONS, **options)
    (dx,) = torch.autograd.grad(out, x, dout)
    assert torch.equal(dx, rotary_embedding_backward(dout, POSITIONS, **options))


def test_the_backward_is_the_adjoint() -> None:
    x, dout = normal(2, 9, 3, 8), normal(2, 9, 3, 8, seed=1)
    for scaling in (None, YaRN(4.0, 64)):
        there = (dout * rotary_embedding(x, POSITIONS, scaling=scaling)).sum()
        back = (rotary_embedding_backward(dout, POSITIONS, scaling=scaling) * x).sum()
        assert float(there) == pytest.approx(float(back), rel=1e-12)


def test_x_is_not_kept_for_the_backward() -> None:
    x = normal(2, 9, 16, 8, dtype=torch.bfloat16).requires_grad_()
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rotary_embedding(x, POSITIONS)
    assert kept == [(9, 4), (9, 4)]  # the tables alone


# Transformations

IN_DYNAMO = "ignore:.*should not be instantiated:DeprecationWarning"
"""PyTorch 2.13 says so of what it does itself when it traces an autograd function."""


@pytest.mark.filterwarnings(IN_DYNAMO)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_compiled_whole(layout: str, scaling: Any) -> None:
    torch.compiler.reset()

    def loss(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = rotary_embedding(x, positions, rotary_dim=6, layout=layout, scaling=scaling)
        return (out * out.detach().roll(1, -1)).sum()

    x = normal(2, 9, 3, 8, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(x, POSITIONS), x)
    (plain,) = torch.autograd.grad(loss(x, POSITIONS), x)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


@pytest.mark.filterwarnings(IN_DYNAMO)
def test_compiled_for_several_lengths() -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(rotary_embedding, backend=counted, fullgraph=True)
    for length in (3, 5, 9, 17):
        x, positions = normal(2, length, 3, 8), torch.arange(length) + 2**19
        assert torch.equal(compiled(x, positions), rotary_embedding(x, positions))
    assert len(graphs) == 2  # the second is for any length


def test_vmap_and_meta() -> None:
    x, positions = normal(4, 2, 5, 3, 8), torch.arange(5)
    mapped = torch.func.vmap(lambda x: rotary_embedding(x, positions))(x)
    assert torch.equal(mapped[3], rotary_embedding(x[3], positions))
    meta = rotary_embedding(x[0].to("meta"), positions.to("meta"))
    assert (meta.shape, meta.device.type) == ((2, 5, 3, 8), "meta")


@pytest.mark.parametrize(
    ("wrong", "raises", "said"),
    [
        (
            {"positions": torch.arange(5).to("meta")},
            ValueError,
            "positions is on meta, but x is on cpu",
        ),
        ({"positions": torch.zeros(5)}, TypeError, "positions must be integers, got float32"),
        ({"x": torch.zeros(2, 5, 3, 8, dtype=torch.complex64)}, TypeError, "x must be one of"),
        ({"rotary_dim": 3}, ValueError, "rotary_dim must be even"),
    ],
)
def test_wrong_calls(wrong: dict[str, Any], raises: type[Exception], said: str) -> None:
    given = {"x": torch.zeros(2, 5, 3, 8), "positions": torch.arange(5)} | wrong
    with pytest.raises(raises, match=said):
        rotary_embedding(**given)
    with pytest.raises(raises, match=said.replace("x ", "dout ")):
        rotary_embedding_backward(given.pop("x"), **given)
