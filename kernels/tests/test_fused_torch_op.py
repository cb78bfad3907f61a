"""What PyTorch must know of the fused operations, and what their front doors refuse, on a CPU.

A CPU has no kernel of them. For these tests it is lent one, by the PyTorch reference, so that all
that surrounds the kernel is run as on a GPU.
"""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

# Said by PyTorch 2.11 of itself, when it imports its own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

from isoform.kernels import (  # noqa: E402
    bias_dropout_residual,
    bias_gelu,
    fused,
    fused_launch,
    fused_torch,
    layer_norm,
    masked_softmax,
)
from isoform.kernels.emulate.calls import launch_all  # noqa: E402
from isoform.kernels.launch import Told  # noqa: E402
from isoform.reference.contract import Unsupported  # noqa: E402
from isoform.reference.fused_contract import DRAWS  # noqa: E402
from isoform.reference.numpy import fused as oracle  # noqa: E402
from isoform.reference.numpy.fused import normal  # noqa: E402
from isoform.reference.torch import fused as reference  # noqa: E402

SHAPE = (2, 5, 24)


def form(tanh):
    return "tanh" if tanh else "none"


@torch.library.impl("isoform::layer_norm", "CPU")
def _(x, weight, bias, epsilon):
    out = reference.layer_norm(x, weight, bias, epsilon=epsilon).contiguous()
    _, inverse = oracle.normalized(x.double().numpy(), epsilon)
    statistics = torch.stack((x.double().mean(-1), torch.from_numpy(inverse)[..., 0]), -1)
    return out, statistics.float()


@torch.library.impl("isoform::layer_norm_backward", "CPU")
def _(dout, x, weight, statistics):
    epsilon = statistics[..., 1].double() ** -2 - x.double().var(-1, correction=0)
    arrays = (each.double().numpy() for each in (dout, x, weight))
    found = oracle.layer_norm_backward(*arrays, epsilon=max(float(epsilon.mean()), 1e-9))
    return tuple(torch.from_numpy(each).to(x.dtype).contiguous() for each in found)


@torch.library.impl("isoform::bias_gelu", "CPU")
def _(x, bias, tanh):
    return reference.bias_gelu(x, bias, approximate=form(tanh)).contiguous()


@torch.library.impl("isoform::bias_gelu_backward", "CPU")
def _(dout, x, bias, tanh):
    below, density = normal((x + bias).double().numpy(), form(tanh))  # autograd is off down here
    slope = torch.from_numpy(below + (x + bias).double().numpy() * density)
    dx = (dout * slope).to(x.dtype).contiguous()
    return dx, dx.flatten(0, -2).sum(0)


@torch.library.impl("isoform::bias_dropout_residual", "CPU")
def _(x, bias, residual, seed, threshold):
    p = threshold / DRAWS
    return reference.bias_dropout_residual(x, bias, residual, p, seed=int(seed)).contiguous()


@torch.library.impl("isoform::bias_dropout_residual_backward", "CPU")
def _(dout, seed, threshold):
    kept = reference.draws(tuple(dout.shape), int(seed)) >= threshold
    dx = torch.where(kept, dout * (DRAWS / (DRAWS - threshold)), 0).contiguous()
    return dx, dx.flatten(0, -2).sum(0)


@torch.library.impl("isoform::masked_softmax", "CPU")
def _(scores, mask, causal, scale):
    return reference.masked_softmax(scores, mask=mask, causal=causal, scale=scale).contiguous()


@torch.library.impl("isoform::masked_softmax_backward", "CPU")
def _(dout, probabilities, causal, scale):
    found = reference.masked_softmax_backward(dout, probabilities, scale=scale)
    return found.contiguous()


@pytest.fixture
def gpu(monkeypatch):
    """A CPU counts as a GPU."""
    monkeypatch.setattr(fused, "whereabouts", lambda x: ("cuda", "sm_90"))


def operands(requires_grad=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = (SHAPE, SHAPE[-1:], SHAPE)
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)
        for shape in shapes
    ]


SEED = torch.tensor([-5])


def scores_and_mask(requires_grad=True, dtype=torch.float32, of=(2, 3, 1, 24)):
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(2, 3, 24, 24, generator=generator, dtype=dtype)
    mask = torch.rand(of, generator=generator) < 0.6
    mask[1, ..., :20] = False  # so that with a causal mask there are queries without a key
    return scores.requires_grad_(requires_grad), mask


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    x, bias, residual = operands(requires_grad)
    torch.library.opcheck(fused_torch.gelu_forward, (x, bias, True))
    torch.library.opcheck(fused_torch.dropout_forward, (x, bias, residual, SEED, 6554))
    torch.library.opcheck(fused_torch.layer_norm_forward, (x, bias, residual.detach()[0, 0], 0.1))
    x, bias, dout = operands(requires_grad=False)
    statistics = fused_torch.layer_norm_forward(x, bias, bias, 0.1)[1]
    torch.library.opcheck(fused_torch.layer_norm_backward, (dout, x, bias, statistics))
    torch.library.opcheck(fused_torch.gelu_backward, (dout, x, bias, False))
    torch.library.opcheck(fused_torch.dropout_backward, (dout, SEED, 6554))
    scores, mask = scores_and_mask(requires_grad)
    for masks in ((mask, False), (None, True)):
        torch.library.opcheck(fused_torch.softmax_forward, (scores, *masks, 0.3))
    scores, _ = scores_and_mask(requires_grad=False)
    torch.library.opcheck(fused_torch.softmax_backward, (scores.flip(0), scores, True, 0.3))


def test_layer_norm_and_its_gradients_are_the_references(gpu):
    x, weight, residual = operands(dtype=torch.float64)
    leaves = x, weight, residual.detach()[0, 0].requires_grad_()
    torch.autograd.gradcheck(
        lambda *each: fused_torch.layer_norm(*each, 0.1), leaves, rtol=1e-4, atol=1e-5
    )
    leaves = [each.detach().float().requires_grad_() for each in leaves]
    out, wanted = (
        function(*leaves, epsilon=0.1) for function in (layer_norm, reference.layer_norm)
    )
    assert torch.equal(out, wanted)
    dout = leaves[0].detach().flip(0)
    found = [torch.autograd.grad(each, leaves, dout) for each in (out, wanted)]
    for one, right in zip(*found, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_and_its_gradients_are_the_references(gpu, approximate):
    leaves = operands(dtype=torch.float64)[:2]
    wanted = reference.bias_gelu(*leaves, approximate=approximate)
    tanh = approximate == "tanh"
    assert torch.equal(fused_torch.bias_gelu(*leaves, tanh), wanted)
    torch.autograd.gradcheck(lambda *each: fused_torch.bias_gelu(*each, tanh), leaves)
    x, bias, _ = operands()
    out = bias_gelu(x, bias, approximate=approximate)
    assert torch.equal(out, reference.bias_gelu(x, bias, approximate=approximate))


def test_dropout_and_its_gradients_are_the_references(gpu):
    leaves = operands(dtype=torch.float64)
    function = lambda *each: fused_torch.bias_dropout_residual(*each, 6554, SEED, None)  # noqa: E731
    torch.autograd.gradcheck(function, leaves)
    leaves = operands()
    wanted = reference.bias_dropout_residual(*leaves, 0.1, seed=7)
    for seed in (7, torch.tensor(7)):
        assert torch.equal(bias_dropout_residual(*leaves, 0.1, seed=seed), wanted)
    assert torch.equal(bias_dropout_residual(*leaves, 0.0), sum(leaves))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_and_its_gradient_are_the_references(gpu, masked, causal):
    scores, mask = scores_and_mask(dtype=torch.float64)
    mask = mask if masked else None
    of_one = scores.detach()[:, :1, :3, :3].requires_grad_()
    its_mask = mask[:, :1, :, :3] if masked else None
    torch.autograd.gradcheck(
        lambda x: fused_torch.masked_softmax(x, its_mask, causal, -0.3), of_one
    )
    scores, _ = scores_and_mask()
    call = {"mask": mask, "causal": causal, "scale": 0.3}
    out, wanted = masked_softmax(scores, **call), reference.masked_softmax(scores, **call)
    assert torch.equal(out, wanted)
    dout = scores.detach().flip(0)
    found = [torch.autograd.grad(each, scores, dout)[0] for each in (out, wanted)]
    assert torch.equal(*found)


def test_of_a_softmax_the_result_alone_is_kept(gpu):
    scores, mask = scores_and_mask()
    kept = []

    def pack(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = masked_softmax(scores, mask=mask)
    assert len(kept) == 1 and kept[0].data_ptr() == out.data_ptr()


def test_seeds_of_64_bits_with_and_without_sign(gpu):
    leaves = operands(requires_grad=False)
    found = [bias_dropout_residual(*leaves, 0.5, seed=seed) for seed in (-1, 2**64 - 1, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_without_a_seed_each_call_draws_its_own(gpu):
    leaves = operands(requires_grad=False)
    generator = torch.Generator()

    def drawn(seed):
        if seed is None:
            return bias_dropout_residual(*leaves, 0.5)
        return bias_dropout_residual(*leaves, 0.5, generator=generator.manual_seed(seed))

    torch.manual_seed(3)
    first, second = drawn(None), drawn(None)
    torch.manual_seed(3)
    assert torch.equal(drawn(None), first) and not torch.equal(first, second)
    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))


def test_forward_and_backward_drop_the_same(gpu):
    x, bias, residual = operands()
    out = bias_dropout_residual(x, bias, residual, 0.5)
    out.sum().backward()
    assert torch.equal(x.grad != 0, out != residual)
    assert torch.equal(residual.grad, torch.ones(SHAPE))
    torch.testing.assert_close(bias.grad, x.grad.sum((0, 1)))


def test_where_only_the_residual_has_a_gradient_nothing_is_drawn(gpu, monkeypatch):
    x, bias, residual = operands(requires_grad=False)
    out = bias_dropout_residual(x, bias, residual.requires_grad_(), 0.5)
    monkeypatch.setattr(fused_torch, "dropout_backward", None)
    out.sum().backward()
    assert torch.equal(residual.grad, torch.ones(SHAPE))


def test_it_compiles_in_one_graph(gpu):
    def model(x, bias, residual):
        x = bias_gelu(layer_norm(x, bias, bias), bias)
        return 2 * bias_dropout_residual(x, bias, residual, 0.5)

    torch._dynamo.reset()
    leaves = operands()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = compiled(*leaves), compiled(*leaves)
    assert not torch.equal(first, second)  # each call has a seed of its own
    x, _, residual = leaves
    first.sum().backward()
    kept = first != 2 * residual
    assert x.grad.isfinite().all() and x.grad.any()
    gelu = reference.bias_gelu(reference.layer_norm(x, leaves[1], leaves[1]), leaves[1])
    torch.testing.assert_close(first, 2 * (residual + 2 * kept * (gelu + leaves[1])))


def test_a_softmax_compiles_in_one_graph(gpu):
    torch._dynamo.reset()
    scores, mask = scores_and_mask()

    def model(scores, mask):
        return 2 * masked_softmax(scores, mask=mask, causal=True, scale=0.3)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, wanted = (function(scores, mask) for function in (compiled, model))
    assert torch.equal(found, wanted)
    dout = scores.detach().flip(0)
    assert torch.equal(*(torch.autograd.grad(each, scores, dout)[0] for each in (found, wanted)))


def test_it_is_not_differentiated_twice(gpu):
    x, bias, residual = operands()
    scores, mask = scores_and_mask()
    for out, leaf in (
        (layer_norm(x, bias, bias), x),
        (bias_gelu(x, bias), x),
        (bias_dropout_residual(x, bias, residual, 0.5), x),
        (masked_softmax(scores, mask=mask), scores),
    ):
        dout = torch.ones_like(out, requires_grad=True)
        (dx,) = torch.autograd.grad(out, leaf, dout, create_graph=True)
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
            dx.sum().backward()


# --- From tensors to the kernel -------------------------------------------------------------------


@dataclass
class Emulated:
    """What stands for a pass that is ready to be launched: the emulator launches it."""

    told: Told

    @property
    def scratch(self):
        return self.told.work.scratch

    def launch(self, pointers, stream):
        words = np.frombuffer(self.told.arguments.tobytes(), np.uint64).copy()
        assert len(pointers) == len(self.told.places)
        words[np.array(self.told.places) // 8] = pointers
        launch_all(self.told.work.launches, words)


@pytest.fixture
def emulated(monkeypatch):
    """Nothing but the launch itself is not what runs on a GPU."""
    known = {}

    def kept(key, told):
        if key not in known:
            known[key] = Emulated(told())
        return known[key]

    monkeypatch.setattr(fused_launch, "kept", kept)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return known


def lying_oddly(x, how):
    """The same numbers, lying in another way."""
    if how == "apart":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 8), torch.nan, dtype=x.dtype)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if how == "swapped" else x.clone()


@pytest.mark.parametrize("how", ["plainly", "apart", "swapped"])
def test_what_is_launched_is_the_reference(emulated, how):
    x, bias, residual = operands(requires_grad=False, dtype=torch.bfloat16)
    dout = residual.flip(0)
    for _ in range(2):  # the second finds what the first has kept
        moved = [lying_oddly(each, how) for each in (x, residual, dout)]
        out = fused_torch._gelu(moved[0], bias, True)
        torch.testing.assert_close(out, reference.bias_gelu(x, bias))
        dx, dbias = fused_torch._gelu_backward(moved[2], moved[0], bias, True)
        wanted = oracle.bias_gelu_backward(*(each.double().numpy() for each in (dout, x, bias)))
        for found, right in zip((dx, dbias), wanted, strict=True):
            torch.testing.assert_close(
                found.double(), torch.from_numpy(right), rtol=1e-2, atol=1e-2
            )
        out, statistics = fused_torch._norm(moved[0], bias, bias, 0.1)
        torch.testing.assert_close(out, reference.layer_norm(x, bias, bias, epsilon=0.1))
        found = fused_torch._norm_backward(moved[2], moved[0], bias, statistics)
        given = (each.double().numpy() for each in (dout, x, bias))
        wanted = oracle.layer_norm_backward(*given, epsilon=0.1)
        for each, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(each.double(), torch.from_numpy(right), rtol=1e-2, atol=1e-2)
        out = fused_torch._dropout(moved[0], bias, moved[1], SEED, 6554)
        wanted = reference.bias_dropout_residual(x, bias, residual, 0.1, seed=-5)
        torch.testing.assert_close(out, wanted)
        dx, dbias = fused_torch._dropout_backward(moved[2], SEED, 6554)
        wanted = oracle.bias_dropout_residual_backward(dout.double().numpy(), 0.1, seed=-5)
        for found, right in zip((dx, dbias), wanted, strict=False):
            torch.testing.assert_close(
                found.double(), torch.from_numpy(right), rtol=1e-2, atol=1e-2
            )


@pytest.mark.parametrize("of", [(2, 3, 24, 24), (2, 1, 1, 24), (1, 1, 24, 24), (1, 3, 1, 24)])
@pytest.mark.parametrize("how", ["plainly", "apart", "swapped"])
def test_what_is_launched_of_a_softmax_is_the_reference(emulated, how, of):
    scores, mask = scores_and_mask(requires_grad=False, dtype=torch.bfloat16, of=(2, 3, 24, 24))
    mask = mask[: of[0], : of[1], : of[2]]
    dout = scores.flip(0)
    moved = [lying_oddly(x, how) for x in (scores, dout)]
    for each in (mask, lying_oddly(mask, how), mask.mT.contiguous().mT):
        out = fused_torch._softmax(moved[0], each, True, 0.3)
        wanted = reference.masked_softmax(scores, mask=mask, causal=True, scale=0.3)
        torch.testing.assert_close(out, wanted)
        found = fused_torch._softmax_backward(moved[1], out, True, 0.3)
        wanted = reference.masked_softmax_backward(dout, out, scale=0.3)
        torch.testing.assert_close(found, wanted)


# --- How operands lie -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "shape", "stride"),
    [
        (torch.zeros(2, 3, 8), (6, 8), (8, 1)),
        (torch.zeros(2, 3, 16)[..., :8], (6, 8), (16, 1)),  # read as they lie
        (torch.zeros(3, 2, 8).transpose(0, 1), (6, 8), (8, 1)),  # not evenly apart: copied
        (torch.zeros(8, 6).T, (6, 8), (8, 1)),
        (torch.zeros(8).expand(6, 8), (6, 8), (0, 1)),
        (torch.zeros(()).expand(6, 8), (6, 8), (8, 1)),
        (torch.zeros(8), (1, 8), (8, 1)),
        (torch.zeros(2, 0, 8), (0, 8), (8, 1)),
        (torch.zeros(2, 3, 0), (0, 0), (1, 1)),
    ],
)
def test_rows_are_read_as_they_lie_if_evenly_apart(x, shape, stride):
    found = fused_torch._as_matrix(x)
    assert found.shape == shape
    assert found.stride() == stride or 0 in shape or shape[0] == 1


# --- What is refused ------------------------------------------------------------------------------


def test_importing_it_imports_neither_torch_nor_cupy():
    code = "import sys, isoform.kernels.fused; sys.exit(bool({'torch', 'cupy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_reason_is_given():
    x, bias, residual = operands(dtype=torch.float64)
    for call in (
        lambda: layer_norm(x, bias, bias),
        lambda: bias_gelu(x, bias),
        lambda: bias_dropout_residual(x, bias, residual, 0.1),
    ):
        with pytest.raises(Unsupported) as raised:
            call()
        device, dtype = raised.value.reasons
        assert device.startswith("device cpu (cuda only): move the operands to a GPU")
        assert dtype.startswith("dtype float64 (bfloat16, float16, float32 only)")
    with pytest.raises(Unsupported, match=r"C=8193 channels \(at most 8192\)"):
        layer_norm(torch.zeros(2, 8193), torch.zeros(8193), torch.zeros(8193))
    with pytest.raises(Unsupported) as raised:
        masked_softmax(x[None], scale=1e39)
    scale, device, dtype = raised.value.reasons
    assert scale.startswith("scale 1e+39 (of float32 only)")
    assert device.startswith("device cpu (cuda only)") and dtype.startswith("dtype float64")
    with pytest.raises(Unsupported, match="tensors of PyTorch's only"):
        bias_gelu(np.zeros((2, 8), "f4"), np.zeros(8, "f4"))


def test_a_wrong_call_is_wrong_before_it_is_unsupported():
    x, bias, residual = operands()
    for call, raises, says in (
        (lambda: bias_gelu(x, bias[1:]), ValueError, r"bias must be \[C\] with C=24 of x"),
        (lambda: bias_gelu(x, bias.double()), TypeError, "bias must be float32, the dtype of x"),
        (lambda: layer_norm(x, bias[1:], bias), ValueError, r"weight must be \[C\] with C=24 of x"),
        (lambda: layer_norm(x, bias, bias, epsilon=0), ValueError, "epsilon must be finite and"),
        (lambda: bias_gelu(x, bias, approximate="erf"), ValueError, "approximate must be one of"),
    ):
        with pytest.raises(raises, match=says):
            call()
    for wrong, raises, says in (
        ({"p": 2}, ValueError, "p must be from 0 to 1, got 2"),
        ({"p": None}, TypeError, "p must be a real number"),
        ({"residual": x[:1]}, ValueError, r"residual must be of shape \(2, 5, 24\) of x"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ({"seed": 2**64}, ValueError, "seed must have 64 bits"),
        ({"seed": torch.tensor(1.0)}, TypeError, "a tensor of one int64, got float32"),
        ({"seed": torch.tensor([1, 2])}, ValueError, r"seed must be one number, got shape \(2,\)"),
        ({"seed": torch.empty(1, dtype=torch.int64, device="meta")}, ValueError, "seed is on meta"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "not both"),
    ):
        call = {"x": x, "bias": bias, "residual": residual, "p": 0.1} | wrong
        with pytest.raises(raises, match=says):
            bias_dropout_residual(**call)
    scores, mask = scores_and_mask()
    elsewhere = torch.empty(2, 1, 1, 24, dtype=torch.bool, device="meta")
    for wrong, raises, says in (
        ({"scores": scores[0]}, ValueError, r"scores must have 4 axes \[B, H, Q, K\]"),
        ({"mask": mask.float()}, TypeError, "mask must be bool, got float32"),
        ({"mask": mask[..., 1:]}, ValueError, r"mask must be \[B or 1, .* with B=2, .* K=24"),
        ({"mask": elsewhere}, ValueError, "mask is on meta, but scores is on cpu"),
        ({"scores": scores[..., 1:], "mask": None}, ValueError, "got Q=24 and K=23: give a mask"),
        ({"causal": None}, TypeError, "causal must be a bool"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ):
        call = {"scores": scores, "mask": mask, "causal": True} | wrong
        with pytest.raises(raises, match=says):
            masked_softmax(call.pop("scores"), **call)
