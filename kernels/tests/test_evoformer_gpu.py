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
    """Operands in float16 or float32, which NumPy has; bfloat16 is PyTorch's to make of them."""
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


KERNEL_DTYPES = [
    ("cuda-plain", "float32"),
    ("cuda-plain", "bfloat16"),
    ("cuda-tensor", "float16"),
    ("cuda-tensor", "bfloat16"),
]
each_kernel = pytest.mark.parametrize(("kernel", "dtype"), KERNEL_DTYPES)


def tensors(*, requires_grad=True, device="cuda", dtype="float32", **sizes):
    made = {
        name: torch.from_numpy(x).to(device, None if name == "mask" else getattr(torch, dtype))
        for name, x in arrays(**sizes).items()
    }
    return {
        name: x.requires_grad_(requires_grad and name in DIFFERENTIABLE) for name, x in made.items()
    }


def forward_and_backward(operands, **asked):
    out = evoformer_attention(**operands, **asked)
    leaves = [operands[name] for name in DIFFERENTIABLE]
    return [out, *torch.autograd.grad(out, leaves, upstream(out))]


def upstream(out):
    """A cotangent that is the same in each call, and the same for no two elements."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(out.shape, generator=generator).to(out)


def all_equal(some, others):
    return all(torch.equal(x, y) for x, y in zip(some, others, strict=True))


@pytest.mark.parametrize(
    ("kernel", "dtype", "D", "rtol", "atol"),
    [
        ("cuda-plain", "float32", 24, 2e-4, 2e-5),
        ("cuda-plain", "float32", 200, 2e-4, 2e-5),
        ("cuda-tensor", "float16", 24, 1e-2, 1e-2),
        ("cuda-tensor", "float16", 20, 1e-2, 1e-2),
    ],
)
def test_cupy_arrays_forward_and_backward(kernel, dtype, D, rtol, atol):
    cupy = pytest.importorskip("cupy")
    drawn = arrays(D=D, dtype=dtype)
    there = {name: cupy.asarray(x) for name, x in drawn.items()}
    results = evoformer_attention(**there, return_lse=True, kernel=kernel)
    operands = {name: x if name == "mask" else x.astype("f8") for name, x in drawn.items()}
    expected = oracle.evoformer_attention(**operands, return_lse=True)
    dout = np.random.default_rng(2).standard_normal(drawn["q"].shape).astype(dtype)
    results += evoformer_attention_backward(cupy.asarray(dout), **there, kernel=kernel)
    dout = dout.astype("f8")
    expected += tuple(oracle.evoformer_attention_backward(dout, **operands))
    for result, wanted in zip(results, expected, strict=True):
        found = cupy.asnumpy(result).astype("f8")
        np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol * max(1, abs(wanted).max()))


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


@each_kernel
def test_opcheck(kernel, dtype):
    from isoform.kernels import torch_op
    from isoform.kernels.choice import BY_NAME

    save = bool(BY_NAME[kernel].saved)
    made = tensors(dtype=dtype)
    torch.library.opcheck(torch_op.attention, (*made.values(), 0.5, kernel, True, save))
    made = {name: x.detach() for name, x in made.items()}
    out, _, saved = torch_op.attention(*made.values(), 0.5, kernel, False, save)
    kept = (out, saved) if save else (None, None)
    wanted = [True, False, True, True, False, True]
    torch.library.opcheck(
        torch_op.attention_backward, (upstream(out), *made.values(), *kept, 0.5, kernel, wanted)
    )


@each_kernel
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_in_one_graph(backend, kernel, dtype):
    def model(**operands):
        return 2 * evoformer_attention(**operands, kernel=kernel)

    torch._dynamo.reset()
    plainly, compiled = tensors(dtype=dtype), tensors(dtype=dtype)
    expected = model(**plainly)
    out = torch.compile(model, fullgraph=True, backend=backend)(**compiled)
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert all(torch.equal(compiled[name].grad, plainly[name].grad) for name in DIFFERENTIABLE)


@each_kernel
def test_a_gradient_alone_is_what_it_is_among_all(kernel, dtype):
    operands = tensors(dtype=dtype)
    _, *gradients = forward_and_backward(operands, kernel=kernel)
    for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
        frozen = {key: x.detach() for key, x in operands.items()}
        leaf = frozen[name].requires_grad_()
        out = evoformer_attention(**frozen, kernel=kernel)
        (alone,) = torch.autograd.grad(out, [leaf], upstream(out))
        assert torch.equal(alone, gradient)


@each_kernel
@pytest.mark.parametrize("deterministic", [False, True])
def test_equal_calls_give_equal_bits(kernel, dtype, deterministic):
    """Many rows, few tiles of the pair bias: where blocks share a sum."""
    operands = tensors(S=200, Q=70, K=90, dtype=dtype)
    asked = {"kernel": kernel, "deterministic": deterministic}
    expected = forward_and_backward(operands, **asked)
    assert all(all_equal(forward_and_backward(operands, **asked), expected) for _ in range(20))


@each_kernel
def test_operands_that_do_not_lie_on_16_bytes_give_the_same(kernel, dtype):
    """Odd pointers, odd row strides and last axes of any stride, against contiguous copies."""

    def moved(x, how):
        if how == "pointer":
            room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
        elif how == "rows":
            room = x.new_empty(*x.shape[:-1], x.shape[-1] + 3)[..., : x.shape[-1]]
        else:
            room = x.new_empty(*x.shape, 2)[..., 0]
        return room.copy_(x).requires_grad_(x.is_floating_point())

    plainly = tensors(D=32, K=48, dtype=dtype)
    expected = forward_and_backward(plainly, kernel=kernel)
    for how in ("pointer", "rows", "last"):
        operands = {name: moved(x.detach(), how) for name, x in plainly.items()}
        results = forward_and_backward(operands, kernel=kernel)
        assert all_equal(results, expected), how


@each_kernel
def test_operands_broadcast_along_any_axis_give_the_same(kernel, dtype):
    plainly = tensors(D=32, K=48, dtype=dtype)
    for name in DIFFERENTIABLE:
        for axis in range(plainly[name].ndim):
            view = plainly[name].detach().narrow(axis, 0, 1).expand(plainly[name].shape)
            operands = {key: x.detach() for key, x in plainly.items()}
            found, expected = (
                forward_and_backward(
                    {
                        key: x.requires_grad_(key in DIFFERENTIABLE)
                        for key, x in (operands | {name: one}).items()
                    },
                    kernel=kernel,
                )
                for one in (view.detach(), view.clone(memory_format=torch.contiguous_format))
            )
            assert all_equal(found, expected), (name, axis)


@each_kernel
def test_it_runs_on_the_current_stream(kernel, dtype):
    operands = tensors(Q=512, K=512, dtype=dtype)
    expected = forward_and_backward(operands, kernel=kernel)
    dout = upstream(expected[0])
    stream = torch.cuda.Stream()
    q = torch.empty_like(operands["q"])
    late = torch.empty_like(dout)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # another stream would read q before it is written
        leaves = {name: x.detach().requires_grad_(x.requires_grad) for name, x in operands.items()}
        leaves["q"] = q.copy_(operands["q"].detach()).requires_grad_()
        out = evoformer_attention(**leaves, kernel=kernel)
        torch.cuda._sleep(10**8)
        late.copy_(dout)
        gradients = torch.autograd.grad(out, [leaves[name] for name in DIFFERENTIABLE], late)
    stream.synchronize()
    assert all_equal([out, *gradients], expected)


@each_kernel
def test_it_is_captured_in_a_graph(kernel, dtype):
    operands = tensors(Q=64, K=64, S=40, dtype=dtype)
    dout = upstream(operands["q"])

    def leaves():  # anew for each stream: autograd remembers where a leaf was used first
        return {name: x.detach().requires_grad_(x.requires_grad) for name, x in operands.items()}

    def run(made):
        out = evoformer_attention(**made, kernel=kernel)
        return [out, *torch.autograd.grad(out, [made[name] for name in DIFFERENTIABLE], dout)]

    expected = run(leaves())  # compiles too, which a capture forbids
    static = leaves()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static)
    for _ in range(2):  # the second replay finds what the first has left
        for x in captured:
            x.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all_equal(captured, expected)


@each_kernel
def test_more_rows_than_a_grid_has_along_y(kernel, dtype):
    x = torch.randn(1, 70000, 3, 2, 8, device="cuda", dtype=getattr(torch, dtype))

    def run(x):
        leaf = x.detach().requires_grad_()
        out = evoformer_attention(leaf, leaf, leaf, kernel=kernel)
        return [out, *torch.autograd.grad(out, [leaf], torch.ones_like(out))]

    assert all_equal([y[:, -2:] for y in run(x)], run(x[:, -2:]))


@pytest.mark.parametrize("kernel", ["cuda-plain", "cuda-tensor"])
def test_more_elements_than_32_bits_count(kernel):
    x = torch.randn(1, 2**31 // (64 * 128) + 9, 64, 2, 64, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    out = evoformer_attention(x, x, x, kernel=kernel)
    last = x[:, -3:]
    assert torch.equal(out[:, -3:], evoformer_attention(last, last, last, kernel=kernel))


# B, S, Q, K, H, G, D of calls whose memory is not all in the logits' shadow: a model's rows and
# triangles, and few tiles of the pair bias under many rows.
def measured(run):
    """What a second call of ``run`` returns, and the bytes that it asked PyTorch for at its peak.

    What was asked for, and not what PyTorch took for it: it rounds up by as much as a megabyte.
    """
    run()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = run()
    return results, torch.cuda.memory_stats()["requested_bytes.all.peak"] - held


MEMORY = {
    "msa-row": {"S": 128, "Q": 256, "K": 256, "H": 8, "G": 8, "D": 32},
    "triangle": {"S": 256, "Q": 256, "K": 256, "H": 4, "G": 4, "D": 32},
    "extra-msa": {"S": 512, "Q": 128, "K": 128, "H": 8, "G": 8, "D": 8},
    "many-rows": {"S": 1024, "Q": 64, "K": 64, "H": 4, "G": 4, "D": 32},
    "diffusion": {"S": 8, "Q": 384, "K": 384, "H": 16, "G": 16, "D": 48},
}


@pytest.mark.parametrize("sizes", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("absent", [(), ("mask_bias", "gate")], ids=["all", "rows"])
@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low-memory"])
def test_memory_of_the_tensor_core_kernel(sizes, absent, low_memory):
    """Within 5 % of out, gradients, lse, delta and one float32 dpair_bias; with a mask bias also
    its gradient's parts by head, which are as large as lse where there are as many keys. A number
    more for each query, unless memory is short.
    """
    made = tensors(dtype="bfloat16", **sizes)
    operands = {name: x for name, x in made.items() if name not in absent}
    leaves = [operands[name] for name in DIFFERENTIABLE if name in operands]
    dout = upstream(operands["q"])

    def run():
        out = evoformer_attention(**operands, low_memory=low_memory)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    results, peak = measured(run)
    B, S, Q, H, _ = operands["q"].shape
    per_query = 4 * B * S * H * Q
    dpair_bias = 4 * operands["pair_bias"].numel()
    parts = per_query if "mask_bias" in operands else 0
    least = sum(x.nbytes for x in results) + 2 * per_query + dpair_bias + parts
    assert peak <= 1.05 * least + (0 if low_memory else per_query)


def test_memory_of_the_plain_kernel():
    """Results, gradients and a few numbers per query."""
    operands = tensors(S=64, Q=256, K=256, H=4, G=4, D=32)
    dout = upstream(operands["q"])
    leaves = [operands[name] for name in DIFFERENTIABLE]

    def run():
        out = evoformer_attention(**operands, kernel="cuda-plain")
        return [out, *torch.autograd.grad(out, leaves, dout)]

    results, peak = measured(run)
    per_query = 4 * 64 * 4 * 256
    assert peak <= 1.05 * (sum(x.nbytes for x in results) + 3 * per_query)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="there is one GPU")
@each_kernel
def test_it_runs_where_the_operands_are(kernel, dtype):
    """On the second device while the first is current, and back."""
    there = tensors(device="cuda:1", dtype=dtype)
    expected = forward_and_backward(tensors(device="cuda:0", dtype=dtype), kernel=kernel)
    results = forward_and_backward(there, kernel=kernel)
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in results)
    assert all_equal([x.to("cuda:0") for x in results], expected)


def test_operands_on_different_devices_are_named():
    operands = tensors(requires_grad=False)
    with pytest.raises(ValueError, match="v is on cpu, but q is on cuda:0"):
        evoformer_attention(**operands | {"v": operands["v"].cpu()})


def test_explain_says_which_kernel_runs():
    explained = explain(**tensors())
    assert explained["cuda-tensor"] != () and explained["cuda-plain"] == ()
    tensor_cores = torch.cuda.get_device_capability() >= (8, 0)
    assert (explain(**tensors(dtype="bfloat16"))["cuda-tensor"] == ()) == tensor_cores


def test_deepspeeds_function():
    operands = tensors(Q=33, K=33, H=2, G=2)
    named = {name: operands[name] for name in ("mask_bias", "pair_bias")}
    out = DS4Sci_EvoformerAttention(
        operands["q"], operands["k"], operands["v"], list(named.values())
    )
    expected = evoformer_attention(operands["q"], operands["k"], operands["v"], **named)
    assert torch.equal(out, expected)
