"""What PyTorch must know of the operation, checked on a CPU: shapes, autograd, compilation.

A CPU has no kernel of it. For these tests it is lent one, the NumPy reference, so that all that
surrounds the kernel is run as on a GPU. `nox -s gpu` does the same with the kernels themselves.
"""

import numpy as np
import pytest

from isoform.reference.contract import DIFFERENTIABLE
from isoform.reference.numpy import evoformer as oracle

torch = pytest.importorskip("torch")

# Said by PyTorch 2.11 of itself, when it imports its own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

from isoform.kernels import evoformer, evoformer_attention, torch_op  # noqa: E402
from isoform.reference.torch import evoformer_attention as reference  # noqa: E402


def arrays(*operands):
    return [None if x is None else x.detach().numpy() for x in operands]


@torch_op.attention.register_kernel("cpu")
def _(q, k, v, mask, mask_bias, pair_bias, gate, scale):
    q, k, v, mask, mask_bias, pair_bias, gate = arrays(q, k, v, mask, mask_bias, pair_bias, gate)
    biases = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}
    results = oracle.evoformer_attention(q, k, v, **biases, scale=scale, return_lse=True)
    return tuple(torch.from_numpy(x) for x in results)


@torch_op.attention_backward.register_kernel("cpu")
def _(dout, q, k, v, mask, mask_bias, pair_bias, gate, scale, wanted):
    dout, q, k, v, *rest = arrays(dout, q, k, v, mask, mask_bias, pair_bias, gate)
    biases = dict(zip(("mask", "mask_bias", "pair_bias", "gate"), rest, strict=True))
    found = oracle.evoformer_attention_backward(dout, q, k, v, **biases, scale=scale)
    return [
        torch.from_numpy(np.array(x)) if needed else torch.empty(0)
        for x, needed in zip(found, wanted, strict=True)
    ]


@pytest.fixture(autouse=True)
def a_cpu_counts_as_a_gpu(monkeypatch):
    monkeypatch.setattr(evoformer, "device_kind", lambda x: "cuda")


def operands(*, requires_grad=DIFFERENTIABLE, without=()):
    generator = torch.Generator().manual_seed(1)
    B, S, Q, K, H, G, D = 2, 3, 5, 7, 4, 2, 6
    sizes = {
        "q": (B, S, Q, H, D),
        "k": (B, S, K, G, D),
        "v": (B, S, K, G, D),
        "mask": (B, S, K),
        "mask_bias": (B, S, 1, 1, K),
        "pair_bias": (B, 1, H, Q, K),
        "gate": (B, S, Q, H, D),
    }
    made = {}
    for name, size in sizes.items():
        x = torch.randn(size, generator=generator)
        made[name] = None if name in without else x > -1 if name == "mask" else x
    return {name: x.requires_grad_() if name in requires_grad and x is not None else x
            for name, x in made.items()}  # fmt: skip


@pytest.mark.parametrize("without", [(), ("mask", "gate"), ("mask_bias", "pair_bias")])
def test_opcheck(without):
    torch.library.opcheck(torch_op.attention, (*operands(without=without).values(), 0.5))


def test_opcheck_of_the_backward():
    made = operands(requires_grad=())
    dout = torch.ones_like(made["q"])
    wanted = [True, False, True, True, False, True]
    torch.library.opcheck(torch_op.attention_backward, (dout, *made.values(), 0.5, wanted))


@pytest.mark.parametrize("requires_grad", [DIFFERENTIABLE, ("v",), ("pair_bias", "gate"), ()])
def test_gradients_reach_the_operands_that_want_them(requires_grad):
    mine, theirs = operands(requires_grad=requires_grad), operands(requires_grad=requires_grad)
    out, expected = evoformer_attention(**mine), reference(**theirs)
    torch.testing.assert_close(out, expected)
    assert out.requires_grad == bool(requires_grad)
    if requires_grad:
        dout = torch.randn(out.shape)
        out.backward(dout)
        expected.backward(dout)
    for name in mine:
        if name in requires_grad:
            torch.testing.assert_close(mine[name].grad, theirs[name].grad)
        else:
            assert mine[name] is None or mine[name].grad is None


def test_lse_has_no_gradient_and_says_so():
    _, lse = evoformer_attention(**operands(), return_lse=True)
    assert lse.shape == (2, 3, 4, 5)
    assert not lse.requires_grad


def test_no_second_derivative_is_made_up():
    made = operands()
    (dq,) = torch.autograd.grad(
        evoformer_attention(**made).square().sum(), made["q"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dq.sum().backward()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_compiles_in_one_graph(return_lse, scale):
    def model(**operands):
        found = evoformer_attention(**operands, scale=scale, return_lse=return_lse)
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


def test_pytorch_has_autograd_instead_of_the_explicit_backward():
    made = operands(requires_grad=())
    with pytest.raises(TypeError, match="autograd"):
        evoformer.evoformer_attention_backward(made["q"], **made)
