"""On a GPU: LayerNorm, bias and GeLU, bias, dropout and residual, and the masked softmax, against
the reference.

Skipped where there is no GPU, unless ISOFORM_REQUIRE_GPU is set: then having none is an error.
"""

import os

import pytest

from isoform.kernels import bias_dropout_residual, bias_gelu, layer_norm, masked_softmax
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


NORMED = [*SHAPES, (9, 8192), (5, 8191), (3, 1032), (700, 128)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", NORMED, ids=str)
def test_layer_norm_and_its_gradients(shape, dtype):
    (x, weight, _), dout = operands(shape, dtype)
    bias = weight.detach().flip(0).requires_grad_()
    out = layer_norm(x, weight, bias, epsilon=0.01)
    found = torch.autograd.grad(out, (x, weight, bias), dout)
    assert_right(out, oracle.layer_norm(*doubled(x, weight, bias), epsilon=0.01))
    wanted = oracle.layer_norm_backward(*doubled(dout, x, weight), epsilon=0.01)
    assert_right(found[0], wanted[0])
    for each, right in zip(found[1:], wanted[1:], strict=True):
        assert_right(each, right, tokens_of(shape))


def test_a_large_mean_costs_layer_norm_no_digits():
    (x, weight, bias), _ = operands((64, 2560), torch.float32, requires_grad=False)
    bias = bias[0]
    wanted = layer_norm(x, weight, bias)
    found = layer_norm(x + 512, weight, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_rows_of_a_layer_norm_that_lie_oddly():
    (x, weight, _), dout = operands((6, 9, 96), torch.bfloat16, requires_grad=False)
    wanted = layer_norm(x, weight, weight)
    wide = torch.full((6, 9, 200), torch.nan, device="cuda", dtype=torch.bfloat16)
    for part in (wide[..., :96], wide[..., 3:99], wide[..., 1:193:2]):
        part.copy_(x)
        torch.testing.assert_close(layer_norm(part, weight, weight), wanted)
    x.requires_grad_()
    out = layer_norm(x, weight, weight)
    (dx,) = torch.autograd.grad(out, x, dout.transpose(0, 1).contiguous().transpose(0, 1))
    assert_right(dx, oracle.layer_norm_backward(*doubled(dout, x, weight))[0])


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
        lambda x, bias, residual: layer_norm(x, bias, bias) + residual,
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
    torch.library.opcheck(fused_torch.layer_norm_forward, (x, bias, bias.detach(), 0.1))
    x, bias = x.detach(), bias.detach()
    torch.library.opcheck(fused_torch.gelu_backward, (dout, x, bias, False))
    statistics = fused_torch.layer_norm_forward(x, bias, bias, 0.1)[1]
    torch.library.opcheck(fused_torch.layer_norm_backward, (dout, x, bias, statistics))
    torch.library.opcheck(fused_torch.dropout_backward, (dout, seed, 6554))
    scores = torch.randn(2, 3, 8, 8, device="cuda", requires_grad=True)
    mask = torch.rand(2, 1, 1, 8, device="cuda") < 0.5
    torch.library.opcheck(fused_torch.softmax_forward, (scores, mask, True, 0.3))
    scores = scores.detach()
    torch.library.opcheck(fused_torch.softmax_backward, (scores.flip(0), scores, True, 0.3))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_in_one_graph(backend):
    def model(x, bias, residual):
        x = bias_gelu(layer_norm(x, bias, bias), bias)
        return 2 * bias_dropout_residual(x, bias, residual, 0.5)

    torch._dynamo.reset()
    leaves, _ = operands((40, 64), torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    first, second = compiled(*leaves), compiled(*leaves)
    assert not torch.equal(first, second)  # each call has a seed of its own
    first.sum().backward()
    assert leaves[0].grad.isfinite().all() and leaves[0].grad.any()
    assert torch.equal(leaves[2].grad, torch.full_like(leaves[2], 2))


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


# --- The masked softmax ---------------------------------------------------------------------------

SCORES = [
    (2, 3, 5, 64),
    (1, 2, 130, 130),
    (2, 1, 7, 1000),
    (1, 2, 3, 1029),  # a number at a time, by several warps
    (1, 2, 4, 4096),
    (1, 1, 3, 16384),  # the most that a block holds
    (1, 1, 3, 40_000),  # read twice
    (1, 1, 2, 16_387),
    (3, 2, 1, 1),
    (2, 0, 3, 8),
    (2, 1, 3, 0),
]


def scores_and_dout(shape, dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    drawn = (torch.randn(shape, generator=generator, device="cuda") for _ in range(2))
    scores, dout = ((3 * x).to(dtype) for x in drawn)
    return scores.requires_grad_(), dout


def assert_softmax(shape, dtype, mask, causal=False):
    """The gradient is held to the probabilities that it is computed from."""
    scores, dout = scores_and_dout(shape, dtype)
    out = masked_softmax(scores, mask=mask, causal=causal, scale=0.7)
    (found,) = torch.autograd.grad(out, scores, dout)
    theirs = None if mask is None else mask.cpu().numpy()
    p = oracle.masked_softmax(*doubled(scores), mask=theirs, causal=causal, scale=0.7)
    eps = max(torch.finfo(dtype).eps, 2.0**-16)
    least = 2.0**-24 if dtype == torch.float16 else 1e-12
    held, wanted = out.detach().double().cpu(), torch.from_numpy(p)
    torch.testing.assert_close(held, wanted, rtol=eps, atol=least)
    assert not held[wanted == 0].any()
    gradient = torch.from_numpy(oracle.masked_softmax_backward(*doubled(dout, out), scale=0.7))
    dp = dout.double().cpu().abs()
    terms = held * (dp + (held * dp).sum(-1, keepdim=True))  # of a difference that may cancel
    difference = (found.double().cpu() - gradient).abs()
    assert (difference <= eps * gradient.abs() + 2.0**-20 * terms + least).all()
    assert not found.cpu()[wanted == 0].any()


@pytest.mark.parametrize("masked", ["", "B11K", "1HQK"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SCORES, ids=str)
def test_softmax_and_its_gradient(shape, dtype, masked):
    sizes = dict(zip("BHQK", shape, strict=True)) | {"1": 1}
    mask = None
    if masked:
        generator = torch.Generator("cuda").manual_seed(2)
        of = [sizes[axis] for axis in masked]
        mask = torch.rand(of, generator=generator, device="cuda") < 0.6
        mask[-1:, :, -1:] = False  # queries without a key
    assert_softmax(shape, dtype, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 37, 64, 1000, 2056])
def test_causal_softmax_and_its_gradient(length, dtype, masked):
    mask = torch.rand(2, 1, 1, length, device="cuda") < 0.6 if masked else None
    assert_softmax((2, 2, length, length), dtype, mask, causal=True)


def test_causal_softmax_of_long_rows():
    """Their first and their last, of a matrix too large for the oracle."""
    length = 16392
    scores = torch.randn(1, 1, length, length, device="cuda", dtype=torch.bfloat16)
    out = masked_softmax(scores, causal=True)
    wanted = scores.float().masked_fill_(
        ~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf
    )
    wanted = torch.softmax(wanted, -1).to(torch.bfloat16)
    torch.testing.assert_close(out, wanted, rtol=2**-7, atol=1e-12)


@pytest.mark.parametrize("keys", [200, 4096, 20_000])
def test_softmax_looks_at_nothing_that_is_not_attended_to(keys):
    scores, dout = scores_and_dout((2, 2, 3, keys), torch.bfloat16)
    mask = torch.rand(2, 1, 1, keys, device="cuda") < 0.6
    dropped = ~mask.expand_as(scores)
    found = []
    for garbage in (0.0, torch.nan, torch.inf):
        x = scores.detach().masked_fill(dropped, garbage).requires_grad_()
        out = masked_softmax(x, mask=mask)
        out.backward(dout.masked_fill(dropped, garbage))
        assert not out[dropped].any() and not x.grad[dropped].any()
        found.append((out, x.grad))
    for each in found[1:]:
        assert all(map(torch.equal, each, found[0]))
    x = scores.detach().clone()
    x[0, 0, 0, 7], x[0, 0, 1] = torch.nan, -torch.inf
    mask[0, ..., 7] = True
    out = masked_softmax(x, mask=mask)
    assert torch.equal(out[0, 0, 0].isnan(), mask[0, 0, 0]) and not out[0, 0, 1].any()
    assert not out[0, 1].isnan().any()


def test_scores_and_masks_that_lie_oddly():
    x, mask = (
        torch.randn(2, 3, 40, 96, device="cuda"),
        torch.rand(2, 3, 40, 96, device="cuda") < 0.5,
    )
    x = x.bfloat16()
    wanted = masked_softmax(x, mask=mask)
    wide = torch.full((2, 3, 40, 200), torch.nan, device="cuda", dtype=torch.bfloat16)
    for part in (wide[..., :96], wide[..., 3:99], wide[..., 1:193:2]):
        part.copy_(x)
        assert torch.equal(masked_softmax(part, mask=mask), wanted)
    for each in (mask.transpose(0, 1).contiguous().transpose(0, 1), mask.mT.contiguous().mT):
        assert torch.equal(masked_softmax(x, mask=each), wanted)
    bytes_apart = torch.zeros(2, 3, 40, 99, device="cuda", dtype=torch.bool)
    bytes_apart[..., 1:97] = mask
    assert torch.equal(masked_softmax(x, mask=bytes_apart[..., 1:97]), wanted)


def test_equal_softmaxes_give_equal_bits():
    for keys in (300, 8192, 40_000):
        scores, dout = scores_and_dout((1, 4, 50, keys), torch.float32)
        first, second = (
            torch.autograd.grad(masked_softmax(scores), scores, dout)[0] for _ in range(2)
        )
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_softmax_compiles_in_one_graph(backend):
    def model(scores, mask):
        return 2 * masked_softmax(scores, mask=mask, causal=True, scale=0.3)

    torch._dynamo.reset()
    scores, dout = scores_and_dout((2, 3, 24, 24), torch.float32)
    mask = torch.rand(2, 1, 1, 24, device="cuda") < 0.6
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found, wanted = (function(scores, mask) for function in (compiled, model))
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(each, scores, dout)[0] for each in (found, wanted)))


def test_of_a_softmax_the_result_alone_is_held():
    scores, _ = scores_and_dout((1, 8, 1024, 1024), torch.bfloat16)
    mask = torch.rand(1, 1, 1, 1024, device="cuda") < 0.6
    masked_softmax(scores, mask=mask)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = masked_softmax(scores, mask=mask)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * out.element_size() + 1024


def test_softmax_beyond_32_bits():
    """The last rows of scores of 2³² + … numbers."""
    scores = torch.zeros(1, 2, 2**18 + 1, 8192, device="cuda", dtype=torch.bfloat16)
    scores[:, :, -1] = torch.randn(8192, device="cuda")
    out = masked_softmax(scores)
    assert torch.equal(out[:, :, -1:], masked_softmax(scores[:, :, -1:]))
    assert (out[:, :, :-1] == 2.0**-13).all()
