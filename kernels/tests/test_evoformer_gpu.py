"""On a GPU: what the conformance suite does not ask. Streams, graphs, compilation, CuPy, limits.

Skipped where there is no GPU, unless ISOFORM_REQUIRE_GPU is set: then having none is an error.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from isoform.kernels import evoformer_attention, evoformer_attention_backward, explain
from isoform.kernels.deepspeed import DS4Sci_EvoformerAttention
from isoform.reference.contract import DIFFERENTIABLE
from isoform.reference.numpy import evoformer as oracle

torch = pytest.importorskip("torch")

# Said by PyTorch 2.11 of itself, when it imports its own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

if not torch.cuda.is_available() and not os.environ.get("ISOFORM_REQUIRE_GPU"):
    pytest.skip("there is no GPU here", allow_module_level=True)


def arrays(B=1, S=3, Q=37, K=45, H=4, G=2, D=24, dtype="float32"):
    rng = np.random.default_rng(1)
    sizes = {
        "q": (B, S, Q, H, D),
        "k": (B, S, K, G, D),
        "v": (B, S, K, G, D),
        "mask": (B, S, K),
        "mask_bias": (B, S, 1, 1, K),
        "pair_bias": (B, 1, H, Q, K),
        "gate": (B, S, Q, H, D),
    }
    drawn = {name: rng.standard_normal(size) for name, size in sizes.items()}
    return {name: x > -1 if name == "mask" else x.astype(dtype) for name, x in drawn.items()}


def tensors(*, requires_grad=True, device="cuda", **sizes):
    made = {name: torch.from_numpy(x).to(device) for name, x in arrays(**sizes).items()}
    return {
        name: x.requires_grad_(requires_grad and name in DIFFERENTIABLE) for name, x in made.items()
    }


def forward_and_backward(operands):
    out = evoformer_attention(**operands)
    leaves = [operands[name] for name in DIFFERENTIABLE]
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def all_equal(some, others):
    return all(torch.equal(x, y) for x, y in zip(some, others, strict=True))


@pytest.mark.parametrize("D", [24, 200])
def test_cupy_arrays_forward_and_backward(D):
    cupy = pytest.importorskip("cupy")
    operands = arrays(D=D)
    there = {name: cupy.asarray(x) for name, x in operands.items()}
    results = evoformer_attention(**there, return_lse=True)
    expected = oracle.evoformer_attention(**operands, return_lse=True)
    dout = np.random.default_rng(2).standard_normal(operands["q"].shape).astype("f4")
    results += evoformer_attention_backward(cupy.asarray(dout), **there)
    expected += tuple(oracle.evoformer_attention_backward(dout, **operands))
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(cupy.asnumpy(result), wanted, rtol=2e-4, atol=2e-5)


def test_cupy_arrays_of_any_strides_absent_operands_and_streams():
    cupy = pytest.importorskip("cupy")
    operands = {name: arrays()[name] for name in "qkv"}
    views = {name: cupy.asarray(x)[:, :, ::-1, :, ::-1] for name, x in operands.items()}
    flipped = {name: x[:, :, ::-1, :, ::-1] for name, x in operands.items()}
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out = evoformer_attention(**views)
        gradients = evoformer_attention_backward(out, **views)
        stream.synchronize()
    wanted = oracle.evoformer_attention(**flipped)
    np.testing.assert_allclose(cupy.asnumpy(out), wanted, rtol=2e-4, atol=2e-5)
    assert gradients[3:] == (None, None, None)


def test_cupy_does_without_torch():
    pytest.importorskip("cupy")
    code = (
        "import sys, cupy; from isoform.kernels import evoformer_attention as attention;"
        "x = cupy.ones((1, 1, 2, 1, 4), 'f4'); attention(x, x, x); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_opcheck():
    from isoform.kernels import torch_op

    torch.library.opcheck(torch_op.attention, (*tensors().values(), 0.5))
    made = tensors(requires_grad=False)
    wanted = [True, False, True, True, False, True]
    torch.library.opcheck(torch_op.attention_backward, (made["q"], *made.values(), 0.5, wanted))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_in_one_graph(backend):
    def model(**operands):
        return 2 * evoformer_attention(**operands)

    torch._dynamo.reset()
    plainly, compiled = tensors(), tensors()
    expected = model(**plainly)
    out = torch.compile(model, fullgraph=True, backend=backend)(**compiled)
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert all(torch.equal(compiled[name].grad, plainly[name].grad) for name in DIFFERENTIABLE)


def test_a_gradient_alone_is_what_it_is_among_all():
    operands = tensors()
    _, *gradients = forward_and_backward(operands)
    for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
        frozen = {key: x.detach() for key, x in operands.items()}
        leaf = frozen[name].requires_grad_()
        out = evoformer_attention(**frozen)
        (alone,) = torch.autograd.grad(out, [leaf], torch.ones_like(out))
        assert torch.equal(alone, gradient)


def test_it_runs_on_the_current_stream():
    operands = tensors(Q=512, K=512, requires_grad=False)
    expected = evoformer_attention(**operands)
    stream = torch.cuda.Stream()
    q = torch.empty_like(operands["q"])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # another stream would read q before it is written
        q.copy_(operands["q"])
        out = evoformer_attention(**operands | {"q": q})
    stream.synchronize()
    assert torch.equal(out, expected)


def test_it_is_captured_in_a_graph():
    operands = tensors(Q=64, K=64)

    def leaves():  # anew for each stream: autograd remembers where a leaf was used first
        return {name: x.detach().requires_grad_(x.requires_grad) for name, x in operands.items()}

    expected = forward_and_backward(leaves())  # compiles too, which a capture forbids
    static = leaves()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(static)
    for x in captured:
        x.detach().fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all_equal(captured, expected)


def test_more_rows_than_a_grid_has_along_y():
    x = torch.randn(1, 70000, 3, 2, 8, device="cuda")
    out = evoformer_attention(x, x, x)
    last = x[:, -2:]
    assert torch.equal(out[:, -2:], evoformer_attention(last, last, last))


def test_more_elements_than_32_bits_count():
    x = torch.randn(1, 2**31 // (64 * 128) + 9, 64, 2, 64, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    out = evoformer_attention(x, x, x)
    last = x[:, -3:]
    assert torch.equal(out[:, -3:], evoformer_attention(last, last, last))


def test_memory_is_results_gradients_and_a_few_numbers_per_query():
    operands = tensors(S=64, Q=256, K=256, H=4, G=4, D=32)
    forward_and_backward(operands)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = forward_and_backward(operands)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    per_query = 4 * 64 * 4 * 256
    dout = results[0].nbytes
    assert peak <= 1.05 * (dout + sum(x.nbytes for x in results) + 4 * per_query)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="there is one GPU")
def test_it_runs_where_the_operands_are():
    expected = forward_and_backward(tensors(device="cuda:0"))
    results = forward_and_backward(tensors(device="cuda:1"))
    assert all(x.device.index == 1 for x in results)
    assert all_equal([x.to("cuda:0") for x in results], expected)


def test_operands_on_different_devices_are_named():
    operands = tensors(requires_grad=False)
    with pytest.raises(ValueError, match="v is on cpu, but q is on cuda:0"):
        evoformer_attention(**operands | {"v": operands["v"].cpu()})


def test_explain_says_that_the_plain_kernel_runs():
    assert explain(**tensors())["cuda-plain"] == ()


def test_deepspeeds_function():
    operands = tensors(Q=33, K=33, H=2, G=2)
    named = {name: operands[name] for name in ("mask_bias", "pair_bias")}
    out = DS4Sci_EvoformerAttention(
        operands["q"], operands["k"], operands["v"], list(named.values())
    )
    expected = evoformer_attention(operands["q"], operands["k"], operands["v"], **named)
    assert torch.equal(out, expected)
