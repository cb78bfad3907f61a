"""On a GPU: what the conformance suite does not ask. One launch for two, in place, streams, graphs.

Skipped where there is no GPU, unless ISOFORM_REQUIRE_GPU is set: then having none is an error.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from isoform.kernels import (
    rotary_embedding,
    rotary_embedding_,
    rotary_embedding_backward,
    rotary_embedding_qk,
    rotary_embedding_qk_,
)
from isoform.reference import numpy as oracle
from isoform.reference.rotary_scaling import DynamicNTK, Linear, Llama3, LongRoPE, YaRN

torch = pytest.importorskip("torch")

# Said by PyTorch 2.11 of itself, when it imports its own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

if not torch.cuda.is_available() and not os.environ.get("ISOFORM_REQUIRE_GPU"):
    pytest.skip("there is no GPU here", allow_module_level=True)

B, L, H, G, D = 2, 33, 6, 2, 64
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SCALINGS = [
    Linear(8.0),
    DynamicNTK(4.0, 2048, 2**19),
    YaRN(16.0, 4096),
    LongRoPE(tuple(np.linspace(1, 1.5, 32)), tuple(np.linspace(1, 60, 32)), 4096, 131072),
    Llama3(),
]


def rows(heads=H, dtype=torch.float32, *, seed=1, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, L, heads, D, generator=generator).to("cuda", dtype)
    return x.requires_grad_(requires_grad)


def positions(dtype=torch.int64, by_example=False):
    generator = torch.Generator().manual_seed(2)
    size = (B, L) if by_example else (L,)
    return torch.randint(2**20, size, generator=generator).to("cuda", dtype)


def wanted(x, p, **how):
    """By the oracle, in float64."""
    backwards = how.pop("backwards", False)
    function = oracle.rotary_embedding_backward if backwards else oracle.rotary_embedding
    return torch.from_numpy(function(x.detach().double().cpu().numpy(), p.cpu().numpy(), **how))


def assert_right(found, expected):
    """As it is rounded, or the next number to that."""
    unit = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.detach().double().cpu(), expected, rtol=unit, atol=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_both_in_one_launch_are_each_alone(dtype, layout):
    q, k, p = rows(dtype=dtype), rows(G, dtype, seed=3), positions(by_example=True)
    how = {"layout": layout, "rotary_dim": 48}
    for x, found in zip((q, k), rotary_embedding_qk(q, k, p, **how), strict=True):
        assert torch.equal(found, rotary_embedding(x, p, **how))
        assert_right(found, wanted(x, p, **how))
    back = rotary_embedding_backward(q, p, **how)
    assert_right(back, wanted(q, p, **how, backwards=True))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.name)
def test_scalings(scaling):
    x, p = rows(), positions()
    assert_right(rotary_embedding(x, p, scaling=scaling), wanted(x, p, scaling=scaling))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_in_place_in_one_projection(dtype):
    qkv = torch.randn(B, L, 3, H, D, device="cuda").to(dtype)
    before, p = qkv.clone(), positions()
    q, k = rotary_embedding_qk_(qkv[:, :, 0], qkv[:, :, 1], p, rotary_dim=32)
    for part, x in enumerate((q, k)):
        assert x.data_ptr() == qkv[:, :, part].data_ptr()
        assert torch.equal(x, rotary_embedding(before[:, :, part], p, rotary_dim=32))
    assert torch.equal(qkv[:, :, 2], before[:, :, 2])
    x = before[:, :, 0]
    assert torch.equal(rotary_embedding_(x, p, rotary_dim=32), q)
    with pytest.raises(ValueError, match="at one place in memory"):
        rotary_embedding_qk_(x, x.view(x.shape), p)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64"])
def test_positions_of_any_dtype(dtype):
    x, p = rows(), torch.arange(L, device="cuda").to(getattr(torch, dtype))
    assert_right(rotary_embedding(x, p), wanted(x, p))


def test_every_cosine_and_sine_is_right_to_float32s_last_bit():
    """As emulated, where products and sums are not fused."""
    hard = torch.tensor([0, 1, 2**16, 2**19, 2**20, 2**21 - 1, -(2**21), 1567239])
    p = torch.cat((hard, torch.randint(-(2**21), 2**21, (20000,)))).cuda()
    x = torch.zeros(1, len(p), 1, 128, device="cuda")
    x[..., :64] = 1
    found = rotary_embedding(x, p)[0, :, 0].cpu().numpy()
    tables = oracle.rotary_tables(p.cpu().numpy(), 128, dtype=np.float64)
    expected = np.concatenate(tables, -1)
    last_place = np.spacing(np.abs(expected).astype(np.float32))
    assert (np.abs(found - expected) <= 0.75 * last_place).all()


def test_autograd_as_often_as_need_be():
    q, k, p = rows(requires_grad=True), rows(G, seed=3, requires_grad=True), positions()
    outs = rotary_embedding_qk(q, k, p, scaling=YaRN(16.0, 4096))
    cotangents = [torch.randn_like(out).requires_grad_() for out in outs]
    gradients = torch.autograd.grad(outs, (q, k), cotangents, create_graph=True)
    for x, dx in zip(cotangents, gradients, strict=True):
        assert_right(dx, wanted(x, p, scaling=YaRN(16.0, 4096), backwards=True))
    v = [torch.randn_like(x) for x in gradients]
    second = torch.autograd.grad(gradients, cotangents, v)
    for x, dx in zip(v, second, strict=True):
        assert_right(dx, wanted(x, p, scaling=YaRN(16.0, 4096)))


def test_opcheck():
    from isoform.kernels import rotary_torch

    plain = (48, 1e4, "half", "", False)
    q, k = rows(requires_grad=True), rows(G, requires_grad=True)
    torch.library.opcheck(rotary_torch.rotation, (q, k, positions(), *plain))
    torch.library.opcheck(rotary_torch.rotation, (q, None, positions(), *plain))
    q, k = q.detach(), k.detach()
    torch.library.opcheck(rotary_torch.rotation_in_place, (q, k, positions(), *plain))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_in_one_graph(backend):
    scaling = Llama3()

    def model(q, k, p):
        q, k = rotary_embedding_qk(2 * q, k, p, scaling=scaling)
        return q.sum(2) * k.sum(2)

    torch._dynamo.reset()
    q, k, p = rows(requires_grad=True), rows(G, requires_grad=True), positions()
    with torch.no_grad():
        expected = model(q, k, p)
    out = torch.compile(model, fullgraph=True, backend=backend)(q, k, p)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    out.sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


@pytest.mark.parametrize("in_place", [False, True])
def test_it_is_captured_in_a_graph_without_a_synchronisation(in_place):
    x, p = rows(), positions()
    function = rotary_embedding_ if in_place else rotary_embedding
    expected = rotary_embedding(x, p)
    rotary_embedding_(x.clone(), p)  # compiled before anything is captured
    static = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which fails at whatever waits for the GPU
        out = function(static, p)
    out.fill_(torch.nan) if not in_place else None
    static.copy_(x)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_call_waits_for_the_gpu_or_takes_more_memory_than_its_results():
    x, p = rows(), positions()
    rotary_embedding(x, p)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = rotary_embedding(x, p)
        rotary_embedding_qk_(out, x, p)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= out.numel() * out.element_size() + 512


def test_the_current_stream_is_used():
    x, p = rows(), positions()
    expected = rotary_embedding(x, p)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x * 1
        out = rotary_embedding(late, p)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_another_gpu_than_the_current_one():
    x, p = rows(), positions()
    out = rotary_embedding(x.to("cuda:1"), p.to("cuda:1"))
    assert out.device.index == 1
    assert torch.equal(out.cpu(), rotary_embedding(x, p).cpu())


def test_offsets_beyond_32_bits():
    """Bytes, and elements: the last head of an array of 2³² + … of them, 8 GiB of bfloat16."""
    length, heads, channels = 2**16 + 3, 512, 128
    x = torch.zeros(1, length, heads, channels, device="cuda", dtype=torch.bfloat16)
    x[0, -1, -1] = torch.arange(channels)
    p = torch.arange(length, device="cuda")
    last = x[:, -1:, -1:].clone()
    rotary_embedding_(x, p)
    assert torch.equal(x[:, -1:, -1:], rotary_embedding(last, p[-1:]))
    assert not x[0, :-1].any()


def test_cupy_arrays_of_any_strides_and_positions():
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(1)
    drawn = rng.standard_normal((B, L, 3, H, D)).astype("f4")
    qkv = cupy.asarray(drawn)
    p = np.arange(L, dtype=np.uint64) + 2**19
    there = cupy.asarray(p)
    how = {"layout": "interleaved", "rotary_dim": 32}
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out = rotary_embedding(qkv[:, :, 0, ::-1, ::-1], there, **how)
        back = rotary_embedding_backward(qkv[:, :, 0], there, **how)
        both = rotary_embedding_qk(qkv[:, :, 0], qkv[:, :, 1, :2], there, **how)
        stream.synchronize()
    for found, x, function in (
        (out, drawn[:, :, 0, ::-1, ::-1], oracle.rotary_embedding),
        (back, drawn[:, :, 0], oracle.rotary_embedding_backward),
        (both[0], drawn[:, :, 0], oracle.rotary_embedding),
        (both[1], drawn[:, :, 1, :2], oracle.rotary_embedding),
    ):
        expected = function(x.astype("f8"), p, **how)
        np.testing.assert_allclose(cupy.asnumpy(found), expected, rtol=1e-6, atol=1e-6)
    rotary_embedding_qk_(qkv[:, :, 0], qkv[:, :, 1], there, **how)
    np.testing.assert_array_equal(cupy.asnumpy(qkv[:, :, 0]), cupy.asnumpy(both[0]))
    np.testing.assert_array_equal(cupy.asnumpy(qkv[:, :, 2]), drawn[:, :, 2])


def test_cupy_does_without_torch():
    pytest.importorskip("cupy")
    code = (
        "import sys, cupy; from isoform.kernels import rotary_embedding;"
        "rotary_embedding(cupy.ones((1, 2, 1, 4), 'f4'), cupy.arange(2));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("shape", [(0, L, H, D), (B, 0, H, D), (B, L, 0, D)])
def test_empty_axes(shape):
    x = torch.zeros(shape, device="cuda", requires_grad=True)
    out = rotary_embedding(x, torch.arange(shape[1], device="cuda"))
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape


def test_what_lies_on_a_cpu_is_declined():
    from isoform.reference.contract import Unsupported

    with pytest.raises(Unsupported, match=r"device cpu.*isoform\.reference"):
        rotary_embedding(rows().cpu(), positions().cpu())
    with pytest.raises(ValueError, match="positions is on cpu, but x is on cuda"):
        rotary_embedding(rows(), positions().cpu())
