"""On a GPU: bias and GeLU, and bias, dropout and residual, against the reference.

Skipped where there is no GPU, unless ISOFORM_REQUIRE_GPU is set: then having none is an error.
"""

import os

import pytest

from isoform.kernels import bias_dropout_residual, bias_gelu
from isoform.reference.numpy import fused as oracle

torch = pytest.importorskip("torch")

# Said by PyTorch 2.11 of itself, when it imports its own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

if not torch.cuda.is_available() and not os.environ.get("ISOFORM_REQUIRE_GPU"):
    pytest.skip("there is no GPU here", allow_module_level=True)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(4, 130, 2560), (333, 264), (17, 20), (3, 5, 7), (512,), (0, 64), (70, 1)]
SEED = 0x0123456789ABCDEF


def operands(shape, dtype, requires_grad=True):
    generator = torch.Generator().manual_seed(1)

    def drawn(*sizes):
        return torch.randn(*sizes, generator=generator).to("cuda", dtype)

    leaves = drawn(*shape), drawn(shape[-1]), drawn(*shape)
    return [x.requires_grad_(requires_grad) for x in leaves], drawn(*shape)


def doubled(*tensors):
    return [x.detach().double().cpu().numpy() for x in tensors]


def assert_right(found, wanted, tokens=1):
    """As it is rounded, or the next number to that; sums over tokens err by what they add."""
    unit = max(torch.finfo(found.dtype).eps, 4e-6)
    wanted = torch.from_numpy(wanted)
    more = 1e-6 * max(1, tokens)
    torch.testing.assert_close(found.detach().double().cpu(), wanted, rtol=unit, atol=unit + more)


def tokens_of(shape):
    return torch.Size(shape[:-1]).numel()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_and_its_gradients(shape, dtype, approximate):
    (x, bias, _), dout = operands(shape, dtype)
    out = bias_gelu(x, bias, approximate=approximate)
    found = torch.autograd.grad(out, (x, bias), dout)
    given = doubled(x, bias)
    assert_right(out, oracle.bias_gelu(*given, approximate=approximate))
    wanted = oracle.bias_gelu_backward(*doubled(dout), *given, approximate=approximate)
    assert_right(found[0], wanted[0])
    assert_right(found[1], wanted[1], tokens_of(shape))


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_and_its_gradients(shape, dtype, p):
    leaves, dout = operands(shape, dtype)
    out = bias_dropout_residual(*leaves, p, seed=SEED)
    dx, dbias, dresidual = torch.autograd.grad(out, leaves, dout)
    assert_right(out, oracle.bias_dropout_residual(*doubled(*leaves), p, seed=SEED))
    wanted = oracle.bias_dropout_residual_backward(*doubled(dout), p, seed=SEED)
    assert_right(dx, wanted[0])
    assert ((dx != 0).cpu().numpy() == (wanted[0] != 0)).all()  # each draw, bit by bit
    assert_right(dbias, wanted[1], tokens_of(shape))
    assert torch.equal(dresidual, dout)


def test_rows_that_lie_oddly():
    (x, bias, residual), dout = operands((6, 9, 96), torch.bfloat16, requires_grad=False)
    wanted = bias_dropout_residual(x, bias, residual, 0.5, seed=1)
    wide = torch.full((6, 9, 200), torch.nan, device="cuda", dtype=torch.bfloat16)
    for part in (wide[..., :96], wide[..., 3:99], wide[..., 1:193:2]):
        part.copy_(x)
        assert torch.equal(bias_dropout_residual(part, bias, residual, 0.5, seed=1), wanted)
        assert torch.equal(bias_gelu(part, bias), bias_gelu(x, bias))
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    x = swapped.requires_grad_()
    out = bias_dropout_residual(x, bias, residual, 0.5, seed=1)
    assert torch.equal(out, wanted)
    out.backward(dout.transpose(0, 1).contiguous().transpose(0, 1))
    (dx, *_) = oracle.bias_dropout_residual_backward(*doubled(dout), 0.5, seed=1)
    assert_right(x.grad, dx)


def test_equal_calls_give_equal_bits():
    leaves, dout = operands((5000, 300), torch.bfloat16)
    for function in (
        lambda x, bias, residual: bias_gelu(x, bias) + residual,
        lambda *each: bias_dropout_residual(*each, 0.1, seed=1),
    ):
        first, second = (torch.autograd.grad(function(*leaves), leaves, dout) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_a_seed_is_drawn_on_the_gpu():
    leaves, _ = operands((300, 64), torch.bfloat16, requires_grad=False)
    torch.cuda.manual_seed(3)
    first, second = (bias_dropout_residual(*leaves, 0.5) for _ in range(2))
    torch.cuda.manual_seed(3)
    assert torch.equal(bias_dropout_residual(*leaves, 0.5), first)
    assert not torch.equal(first, second)
    generator = torch.Generator("cuda").manual_seed(5)
    drawn = bias_dropout_residual(*leaves, 0.5, generator=generator)
    generator.manual_seed(5)
    assert torch.equal(bias_dropout_residual(*leaves, 0.5, generator=generator), drawn)


def test_the_share_that_is_dropped():
    (x, bias, residual), _ = operands((4096, 1024), torch.float32, requires_grad=False)
    for p in (0.1, 0.5):
        out = bias_dropout_residual(x, bias, residual, p)
        share = float((out == residual).float().mean())
        assert abs(share - p) < 6 * (p * (1 - p) / out.numel()) ** 0.5 + 1 / 65536


def test_opcheck():
    from isoform.kernels import fused_torch

    (x, bias, residual), dout = operands((3, 5, 24), torch.float32)
    seed = torch.tensor([-5], device="cuda")
    torch.library.opcheck(fused_torch.gelu_forward, (x, bias, True))
    torch.library.opcheck(fused_torch.dropout_forward, (x, bias, residual, seed, 6554))
    x, bias = x.detach(), bias.detach()
    torch.library.opcheck(fused_torch.gelu_backward, (dout, x, bias, False))
    torch.library.opcheck(fused_torch.dropout_backward, (dout, seed, 6554))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_in_one_graph(backend):
    def model(x, bias, residual):
        return 2 * bias_dropout_residual(bias_gelu(x, bias), bias, residual, 0.5)

    torch._dynamo.reset()
    leaves, _ = operands((40, 64), torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    first, second = compiled(*leaves), compiled(*leaves)
    assert not torch.equal(first, second)  # each call has a seed of its own
    first.sum().backward()
    assert torch.equal(leaves[0].grad != 0, first != 2 * leaves[2])


def test_a_captured_graph_drops_anew_in_each_replay():
    leaves, _ = operands((300, 64), torch.bfloat16, requires_grad=False)
    bias_dropout_residual(*leaves, 0.5)  # compiled before anything is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which fails at whatever waits for the GPU
        out = bias_dropout_residual(*leaves, 0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)


def test_nothing_is_stored_of_what_is_dropped():
    leaves, _ = operands((4096, 1024), torch.bfloat16)
    bias_dropout_residual(*leaves, 0.1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = bias_dropout_residual(*leaves, 0.1)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= out.numel() * out.element_size() + 1024


def test_offsets_beyond_32_bits():
    """The last rows of an array of 2³² + … elements."""
    rows, columns = 2**19 + 3, 8192
    x = torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(columns, device="cuda")
    bias = torch.zeros(columns, device="cuda", dtype=torch.bfloat16)
    out = bias_gelu(x, bias)
    assert torch.equal(out[-1:], bias_gelu(x[-1:], bias)) and not out[:-1].any()
