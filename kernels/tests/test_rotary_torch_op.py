"""What PyTorch must know of the rotary operations, checked on a CPU: autograd, compilation, alias.

A CPU has no kernel of them. For these tests it is lent one, the PyTorch reference, so that all that
surrounds the kernel is run as on a GPU. `nox -s gpu` does the same with the kernel itself.
"""

import pytest

torch = pytest.importorskip("torch")

# Said by PyTorch 2.11 of itself, when it imports its own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

from isoform.kernels import (  # noqa: E402
    rotary,
    rotary_embedding,
    rotary_embedding_,
    rotary_embedding_backward,
    rotary_embedding_qk,
    rotary_embedding_qk_,
    rotary_torch,
)
from isoform.reference import torch as reference  # noqa: E402
from isoform.reference.contract import Unsupported  # noqa: E402
from isoform.reference.rotary_scaling import DynamicNTK, Linear, Llama3, LongRoPE, YaRN  # noqa: E402

SCALINGS = [
    None,
    Linear(3.7),
    DynamicNTK(4, 2048, 2**19),
    YaRN(16.0, 4096, attention_factor=1.1, truncate=False),
    YaRN(16.0, 4096),
    LongRoPE((1.0, 1.1, 1.2), (1.0, 20.0, 1 / 3), 4096, 8192, factor=2.0),
    Llama3(),
]

LAUNCHED = []
"""Of each launch, how many arrays it turned, and by what."""


def lent(x, other, positions, *plain):
    turn = rotary_torch._read(*plain)
    LAUNCHED.append((1 if other is None else 2, turn))
    function = reference.rotary_embedding_backward if turn.backwards else reference.rotary_embedding
    how = {name: getattr(turn, name) for name in ("base", "rotary_dim", "layout", "scaling")}
    with torch.no_grad():
        return [None if y is None else function(y, positions, **how) for y in (x, other)]


@torch.library.impl("isoform::rotary_embedding", "CPU")
def _(x, other, *arguments):
    out, out_other = lent(x, other, *arguments)
    return out, x.new_empty(0) if other is None else out_other


@torch.library.impl("isoform::rotary_embedding_", "CPU")
def _(x, other, *arguments):
    for y, turned in zip((x, other), lent(x, other, *arguments), strict=True):
        if y is not None:
            y.copy_(turned)


@pytest.fixture(autouse=True)
def a_cpu_counts_as_a_gpu(monkeypatch):
    monkeypatch.setattr(rotary, "whereabouts", lambda x: ("cuda", "sm_90"))
    LAUNCHED.clear()


B, L, H, G, D = 2, 5, 4, 2, 8
HOW = {"base": 500.0, "rotary_dim": 6, "layout": "interleaved"}
PLAIN = (6, 500.0, "interleaved", "", False)


def queries_and_keys(requires_grad=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(B, L, n, D, generator=generator, dtype=dtype) for n in (H, G))
    return q.requires_grad_(requires_grad), k.requires_grad_(requires_grad)


def positions(dtype=torch.int64):
    return torch.tensor([[0, 1, 7, 3, 3], [100, 99, 98, 0, 5]], dtype=dtype)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("with_keys", [False, True])
def test_opcheck(with_keys, requires_grad):
    q, k = queries_and_keys(requires_grad)
    arguments = (q, k if with_keys else None, positions(), *PLAIN)
    torch.library.opcheck(rotary_torch.rotation, arguments)


@pytest.mark.parametrize("with_keys", [False, True])
def test_opcheck_in_place(with_keys):
    q, k = queries_and_keys(requires_grad=False)
    arguments = (q, k if with_keys else None, positions(), *PLAIN)
    torch.library.opcheck(rotary_torch.rotation_in_place, arguments)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_it_is_the_references_function(scaling):
    q, k = queries_and_keys()
    found = rotary_embedding_qk(q, k, positions(), **HOW, scaling=scaling)
    wanted = [reference.rotary_embedding(x, positions(), **HOW, scaling=scaling) for x in (q, k)]
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(rotary_embedding(q, positions(), **HOW, scaling=scaling), wanted[0])
    (launched, one) = LAUNCHED
    assert (launched[0], one[0]) == (2, 1)  # both in one launch
    assert one[1].scaling == scaling  # every digit of it, written down and read again


def test_gradients_of_both_in_one_launch():
    q, k = queries_and_keys(dtype=torch.float64)
    function = lambda q, k: rotary._turned(turn, q, k, positions())  # noqa: E731
    turn = rotary.Turn(6, 500.0, "half", YaRN(8.0, 64), False)
    assert torch.autograd.gradcheck(function, (q, k))
    assert torch.autograd.gradgradcheck(function, (q, k))
    LAUNCHED.clear()
    outs = rotary_embedding_qk(q.float(), k.float(), positions())
    sum(out.sum() for out in outs).backward()
    assert [(count, turn.backwards) for count, turn in LAUNCHED] == [(2, False), (2, True)]


@pytest.mark.parametrize("used", [0, 1])
def test_what_is_not_used_is_not_turned_back(used):
    leaves = queries_and_keys()
    rotary_embedding_qk(*leaves, positions(), **HOW)[used].sum().backward()
    assert leaves[1 - used].grad is None
    ones = torch.ones_like(leaves[used])
    wanted = reference.rotary_embedding_backward(ones, positions(), **HOW)
    assert torch.equal(leaves[used].grad, wanted)
    assert LAUNCHED[-1][0] == 1


@pytest.mark.parametrize("wanted", [0, 1])
def test_what_has_no_gradient_is_not_turned_back(wanted):
    leaves = queries_and_keys()
    leaves[1 - wanted].requires_grad_(False)
    q, k = rotary_embedding_qk(*leaves, positions(), **HOW)
    (q.sum() + k.sum()).backward()
    ones = torch.ones_like(leaves[wanted])
    expected = reference.rotary_embedding_backward(ones, positions(), **HOW)
    assert torch.equal(leaves[wanted].grad, expected)
    assert leaves[1 - wanted].grad is None
    assert LAUNCHED[-1][0] == 1


def test_the_explicit_backward_is_autograds():
    q, _ = queries_and_keys()
    dout = torch.randn(q.shape)
    rotary_embedding(q, positions(), **HOW).backward(dout)
    assert torch.equal(rotary_embedding_backward(dout, positions(), **HOW), q.grad)


def test_in_place_where_queries_and_keys_lie_in_one_projection():
    qkv = torch.randn(B, L, 3, H, D)
    before = qkv.clone()
    q, k = rotary_embedding_qk_(qkv[:, :, 0], qkv[:, :, 1], positions(), **HOW)
    assert q.data_ptr() == qkv.data_ptr() and k.data_ptr() == qkv[:, :, 1].data_ptr()
    for part, x in enumerate((q, k)):
        wanted = reference.rotary_embedding(before[:, :, part], positions(), **HOW)
        assert torch.equal(x, wanted)
    assert torch.equal(qkv[:, :, 2], before[:, :, 2])
    x = before[:, :, 0]
    assert rotary_embedding_(x, positions(), **HOW) is x
    assert torch.equal(x, q)


def test_in_place_no_gradient_is_lost_in_silence():
    q, k = queries_and_keys()
    with pytest.raises(Unsupported, match="gradient of what is turned in place"):
        rotary_embedding_(q, positions())
    with pytest.raises(Unsupported, match="gradient of what is turned in place"):
        rotary_embedding_qk_(q.detach(), k, positions())
    with torch.no_grad():
        rotary_embedding_qk_(q, k, positions())

    w = torch.ones(D, requires_grad=True)
    x = torch.randn(B, L, H, D)
    product = x * w  # whose backward needs x as it was
    rotary_embedding_(x, positions())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_in_place_memory_that_is_shared_is_refused():
    x = torch.zeros(B, L, 1, D).expand(B, L, 3, D)
    with pytest.raises(ValueError, match="x shares memory with itself"):
        rotary_embedding_(x, positions())
    with pytest.raises(ValueError, match="k shares memory with itself"):
        rotary_embedding_qk_(torch.zeros(B, L, 3, D), x, positions())


@pytest.mark.parametrize("scaling", SCALINGS[:4], ids=str)
def test_it_compiles_in_one_graph(scaling):
    def model(q, k, p):
        q, k = rotary_embedding_qk(2 * q, k, p, **HOW, scaling=scaling)
        return q.sum(2) * k.sum(2) + rotary_embedding(k, p, layout="half").sum(2)

    torch._dynamo.reset()
    plainly, compiled = queries_and_keys(), queries_and_keys()
    expected = model(*plainly, positions())
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(*compiled, positions())
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for x, y in zip(compiled, plainly, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_in_place_it_compiles_in_one_graph():
    def model(qkv, p):
        qkv = qkv + 1
        rotary_embedding_qk_(qkv[:, :, 0], qkv[:, :, 1], p, **HOW)
        return qkv * 2

    torch._dynamo.reset()
    qkv = torch.randn(B, L, 3, H, D)
    expected = model(qkv, positions())
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(qkv, positions())
    torch.testing.assert_close(out, expected)


def test_fake_tensors_have_the_shapes_of_the_results():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(H, L, B, D, dtype=torch.bfloat16).transpose(0, 2)
        k, p = torch.empty(B, L, G, D, dtype=torch.bfloat16), torch.empty(L, dtype=torch.int32)
        q_out, k_out = rotary_torch.rotation(q, k, p, *PLAIN)
        _, none = rotary_torch.rotation(q, None, p, *PLAIN)
    assert q_out.shape == q.shape and q_out.is_contiguous() and q_out.dtype == torch.bfloat16
    assert k_out.shape == k.shape and none.shape == (0,)
