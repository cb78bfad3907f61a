"""What PyTorch must know of attention over a sequence, checked on a CPU.

As in ``test_evoformer_torch_op.py``: a CPU is lent a kernel, the NumPy reference, so that all that
surrounds it is run as on a GPU.
"""

import sys

import numpy as np
import pytest

from isoform.reference.numpy import attention as oracle_forward
from isoform.reference.numpy import attention_block_backward as oracle_backward
from isoform.reference.numpy import attention_delta as oracle_delta

torch = pytest.importorskip("torch")

# Said by PyTorch 2.11 of itself, when it imports its own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

from isoform.kernels import (  # noqa: E402
    attention,
    attention_block,
    attention_block_backward,
    attention_library,
    attention_torch,
    attention_vjp,
)
from isoform.kernels.attention_arguments import NO_END  # noqa: E402
from isoform.reference.attention_contract import DIFFERENTIABLE, PLACES, UNLIMITED  # noqa: E402
from isoform.reference.torch import attention as reference  # noqa: E402

door = sys.modules["isoform.kernels.attention"]


def options_of(places, left, right, scale):
    given = zip(PLACES, places, strict=True)
    sides = tuple(UNLIMITED if side == NO_END else side for side in (left, right))
    return {
        **{name: None if x is None else x.numpy() for name, x in given},
        "window": sides,
        "scale": scale,
    }


@torch.library.impl("isoform::attention", "CPU")
def _(q, k, v, *arguments):
    *places, left, right, scale, kernel, wide, keep_lse = arguments
    given = [x.detach().numpy() for x in (q, k, v)]
    options = options_of(places, left, right, scale)
    out, lse = map(torch.from_numpy, oracle_forward(*given, **options, return_lse=True))
    return out, lse if keep_lse else torch.empty(0)


BACKWARDS = []
"""What each backward was given of the forward: out, lse, delta; and what was wanted of it."""


@torch.library.impl("isoform::attention_backward", "CPU")
def _(dout, q, k, v, *arguments):
    *places, out, lse, delta, left, right, scale, kernel, wide, wanted = arguments
    BACKWARDS.append((out, lse, delta, wanted))
    arrays = [x.detach().numpy() for x in (dout, q, k, v, lse)]
    of_the_whole = oracle_delta(arrays[0], out.numpy()) if delta is None else delta.numpy()
    found = oracle_backward(*arrays, of_the_whole, **options_of(places, left, right, scale))
    return [
        torch.from_numpy(np.array(x)) if needed else torch.empty(0)
        for x, needed in zip(found, wanted, strict=True)
    ]


@pytest.fixture(autouse=True)
def a_cpu_counts_as_a_gpu(monkeypatch):
    monkeypatch.setattr(door, "whereabouts", lambda x: ("cuda", "sm_90"))
    BACKWARDS.clear()


def operands(*, requires_grad=DIFFERENTIABLE, B=2, Q=5, K=7, H=4, G=2, D=6):
    generator = torch.Generator().manual_seed(1)
    sizes = {"q": (B, Q, H, D), "k": (B, K, G, D), "v": (B, K, G, D)}
    return {
        name: torch.randn(size, generator=generator).requires_grad_(name in requires_grad)
        for name, size in sizes.items()
    }


def shards():
    """Where queries and keys lie: one for all examples, and each its own."""
    return {
        "positions": torch.tensor([4, 9, 0, 3, 7]),
        "key_positions": torch.tensor([3, 2, 9, 0, 4, 5, 1]),
        "segments": torch.tensor([[0, 0, 1, 1, -1], [2, 2, 2, 0, 0]], dtype=torch.int32),
        "key_segments": torch.tensor([[0, 0, 0, 1, 1, -1, 1], [2, 2, 2, 2, 0, 0, 0]]),
    }


WAYS = {
    "full": {},
    "sharded": {"causal": True, "window": (5, -1), "scale": 0.3, **shards()},
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def as_the_operation_takes_it(way):
    places = [way.get(name) for name in PLACES]
    wide = [None if x is None else x.long().expand(2, -1) for x in places]
    return [*wide, NO_END, 0 if way else NO_END, 0.5, "cuda-tensor"]


@each_way
@pytest.mark.parametrize("keep_lse", [False, True])
def test_opcheck(way, keep_lse):
    made = operands(requires_grad=DIFFERENTIABLE if keep_lse else ())
    arguments = (*made.values(), *as_the_operation_takes_it(way), False, keep_lse)
    torch.library.opcheck(attention_torch.attention, arguments)


@each_way
@pytest.mark.parametrize("of_a_block", [False, True])
def test_opcheck_of_the_backward(way, of_a_block):
    made = operands(requires_grad=())
    dout, statistic = torch.ones_like(made["q"]), torch.zeros(2, 4, 5)
    kept = (None, statistic, statistic) if of_a_block else (dout, statistic, None)
    torch.library.opcheck(
        attention_torch.attention_backward,
        (dout, *made.values(), *as_the_operation_takes_it(way)[:4], *kept,
         *as_the_operation_takes_it(way)[4:], of_a_block, [True, False, True]),
    )  # fmt: skip


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("keep_lse", [False, True])
def test_fake_tensors_have_the_shapes_of_the_results(wide, keep_lse):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        made = [torch.empty(x.shape, dtype=torch.bfloat16) for x in operands().values()]
        made[0] = made[0].transpose(1, 2).contiguous().transpose(1, 2)
        options = as_the_operation_takes_it({})
        out, lse = attention_torch.attention(*made, *options, wide, keep_lse)
        gradients = attention_torch.attention_backward(
            *(made[0], *made, *options[:4], out, lse, None, *options[4:], wide, [True, True, False])
        )
    dtype = torch.float32 if wide else torch.bfloat16
    assert out.shape == made[0].shape and out.is_contiguous() and out.dtype == dtype
    assert lse.shape == ((2, 4, 5) if keep_lse else (0,)) and lse.dtype == torch.float32
    assert [x.shape for x in gradients] == [made[0].shape, made[1].shape, (0,)]
    assert {x.dtype for x in gradients} == {dtype}


@each_way
@pytest.mark.parametrize("requires_grad", [DIFFERENTIABLE, ("v",), ()])
def test_gradients_reach_the_operands_that_want_them(way, requires_grad):
    mine, theirs = operands(requires_grad=requires_grad), operands(requires_grad=requires_grad)
    out, expected = attention(**mine, **way), reference(**theirs, **way)
    torch.testing.assert_close(out, expected)
    assert out.requires_grad == bool(requires_grad)
    if requires_grad:
        dout = torch.randn(out.shape)
        out.backward(dout)
        expected.backward(dout)
        ((_, _, _, wanted),) = BACKWARDS
        assert wanted == [name in requires_grad for name in "qkv"]
    for name in mine:
        if name in requires_grad:
            torch.testing.assert_close(mine[name].grad, theirs[name].grad)
        else:
            assert mine[name].grad is None


def test_lse_has_no_gradient_and_says_so():
    out, lse = attention(**operands(), return_lse=True)
    assert out.requires_grad
    assert lse.shape == (2, 4, 5)
    assert not lse.requires_grad


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch):
    asked = []
    real = attention_torch.attend

    def record(*arguments):
        asked.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(attention_torch, "attend", record)
    attention(**operands(requires_grad=()))
    with torch.no_grad():
        attention(**operands())
    attention(**operands())
    assert asked == [False, False, True]


def test_no_second_derivative_is_made_up():
    made = operands()
    (dq,) = torch.autograd.grad(attention(**made).square().sum(), made["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dq.sum().backward()


@each_way
def test_a_vjp_is_autograds(way):
    made = operands()
    out, take_back = attention_vjp(**made, **way)
    assert not out.requires_grad
    dout = torch.randn(out.shape)
    expected = torch.autograd.grad(attention(**made, **way), list(made.values()), dout)
    for found, wanted in zip(take_back(dout), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_block_has_no_gradient_of_its_own_and_an_explicit_one():
    made = operands()
    out, lse = attention_block(**made)
    assert not out.requires_grad and not lse.requires_grad
    dout = torch.randn(out.shape)
    delta = (dout * out).sum(-1).transpose(1, 2)
    found = attention_block_backward(dout, **made, lse=lse, delta=delta)
    expected = torch.autograd.grad(attention(**made), list(made.values()), dout)
    for x, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(x, wanted)
    ((kept_out, _, kept_delta, _), _) = BACKWARDS
    assert kept_out is None and torch.equal(kept_delta, delta)


@each_way
@pytest.mark.parametrize("return_lse", [False, True])
def test_it_compiles_in_one_graph(way, return_lse):
    def model(q, k, v):
        found = attention(q, k, v, **way, return_lse=return_lse)
        return 2 * (found[0] if return_lse else found)

    torch._dynamo.reset()
    plainly, compiled = operands(), operands()
    expected = model(**plainly)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(**compiled)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(compiled[name].grad, plainly[name].grad)


def test_the_lse_of_a_library_is_made_the_contracts():
    """+inf stands for NaN, and for no sum, of which out is 0."""
    out = torch.ones(1, 4, 1, 8)
    out[0, 1] = torch.nan
    out[0, 2] = 0
    lse = torch.tensor([[[0.5, torch.inf, torch.inf, -3.0]]])
    found = attention_library._regular(lse, out)
    expected = torch.tensor([[[0.5, torch.nan, -torch.inf, -3.0]]])
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_rows_that_a_library_cannot_read_are_copied_and_others_are_not():
    rows = torch.zeros(2, 5, 3, 16, dtype=torch.bfloat16)
    for readable in (rows, rows[:, 1:], rows.transpose(1, 2), rows[..., 8:]):
        assert attention_library._readable(readable) is readable
    for other in (rows[..., ::2], rows[..., 4:12], torch.zeros(2, 5, 3, 12).bfloat16()[..., :8]):
        found = attention_library._readable(other)
        assert found.is_contiguous() and torch.equal(found, other)
