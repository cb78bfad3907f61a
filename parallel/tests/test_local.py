"""Where a rank computes: on a GPU by the kernels, elsewhere by the reference."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import pytest

from isoform.parallel import local

torch = pytest.importorskip("torch")
merge = pytest.importorskip("isoform.reference.torch.attention").merge

OPTIONS = {
    "causal": True,
    "window": None,
    "scale": None,
    "positions": np.array([3, 0, 2, 1]),
    "key_positions": np.array([1, 5, 0]),
}


def operands(dtype: str, device: str) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(2, 4, 4, 8), (2, 3, 2, 8), (2, 3, 2, 8)]
    return [
        torch.randn(size, generator=generator).to(device, getattr(torch, dtype)) for size in sizes
    ]


def options(device: str) -> dict[str, Any]:
    return {
        name: torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x
        for name, x in OPTIONS.items()
    }


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the kernels are asked for."""
    import isoform.kernels.attention  # noqa: F401

    asked: list[tuple[Any, ...]] = []

    def record(*arrays: Any, **given: Any) -> tuple[Any, ...]:
        asked.append((*arrays, given))
        return arrays[:3]

    for name in ("attention_block", "attention_block_backward"):
        monkeypatch.setattr(sys.modules["isoform.kernels.attention"], name, record)
    return asked


@pytest.mark.parametrize(
    ("device", "dtype", "there"),
    [
        ("meta", "float32", False),
        ("cpu", "bfloat16", False),
        ("cuda", "float64", False),
        ("cuda", "float32", True),
        ("cuda", "bfloat16", True),
    ],
)
def test_only_a_gpu_and_no_float64_goes_to_the_kernels(
    device: str, dtype: str, there: bool, kernels: list[tuple[Any, ...]]
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # a device need not be there
        q, k, v = (torch.empty(x.shape, dtype=x.dtype, device=device)
                   for x in operands(dtype, "cpu"))  # fmt: skip
    assert local._on_kernels(q) == there
    if there:
        lse = object()
        local.attend(q, k, v, OPTIONS)
        local.differentiate(q, q, k, v, lse, lse, OPTIONS)
        assert kernels == [(q, k, v, OPTIONS), (q, q, k, v, lse, lse, OPTIONS)]


@pytest.mark.skipif(
    not torch.cuda.is_available() and not os.environ.get("ISOFORM_REQUIRE_GPU"),
    reason="there is no GPU here",
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_gpu_agrees_with_the_reference(dtype: str, tolerance: float) -> None:
    def block(device: str, dtype: str) -> list[Any]:
        q, k, v = operands(dtype, device)
        out, lse = local.attend(q, k, v, options(device))
        dout = torch.ones_like(q)
        delta = local.delta_of(dout, out)
        gradients = local.differentiate(dout, q, k, v, lse, delta, options(device))
        return [out, lse, *gradients]

    rounded = [x.float() for x in operands(dtype, "cpu")]
    assert all(x.dtype == torch.float32 for x in block("cuda", dtype))
    expected = [*local.attend(*rounded, options("cpu"))]
    dout = torch.ones_like(rounded[0])
    delta = local.delta_of(dout, expected[0])
    expected += local.differentiate(dout, *rounded, expected[1], delta, options("cpu"))
    for found, wanted in zip(block("cuda", dtype), expected, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_into_the_first_of_two_is_merging(dtype):
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    (out_a, lse_a), (out_b, lse_b) = ((drawn(2, 5, 3, 4).to(dtype), drawn(2, 3, 5)) for _ in "ab")
    lse_a[0, 0, :2], lse_b[0, 0, 1:3] = -torch.inf, -torch.inf
    lse_a[1, 1, 0], lse_b[1, 1, 1] = 200.0, 200.0
    out_a[0, :2, 0], out_b[0, 1:3, 0] = 0.0, 0.0
    right = merge(out_a.float(), lse_a, out_b.float(), lse_b)
    out, lse = local.merge_into(out_a, lse_a, out_b, lse_b)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(lse, right[1])
    torch.testing.assert_close(out, right[0])
