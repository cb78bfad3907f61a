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

from isoform.kernels import evoformer, evoformer_attention, torch_library, torch_op  # noqa: E402
from isoform.kernels.choice import BY_NAME  # noqa: E402
from isoform.reference.torch import evoformer_attention as reference  # noqa: E402


def arrays(*operands):
    return [None if x is None else x.detach().numpy() for x in operands]


@torch.library.impl("isoform::evoformer_attention", "CPU")
def _(q, k, v, mask, mask_bias, pair_bias, gate, scale, kernel, return_lse, save):
    q, k, v, mask, mask_bias, pair_bias, gate = arrays(q, k, v, mask, mask_bias, pair_bias, gate)
    biases = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}
    out, lse = map(
        torch.from_numpy,
        oracle.evoformer_attention(q, k, v, **biases, scale=scale, return_lse=True),
    )
    # what is saved here is the lse, for each thing that the kernel saves, so that it can be known
    planes = sum(BY_NAME[kernel].saved.values())
    kept = torch.stack([lse.byte()] * planes) if save else torch.empty(0, dtype=torch.uint8)
    return out, lse.float() if return_lse else torch.empty(0), kept


BACKWARDS = []
"""What each backward was given to do with: the kernel's name, its output and what it saved."""


@torch.library.impl("isoform::evoformer_attention_backward", "CPU")
def _(dout, q, k, v, mask, mask_bias, pair_bias, gate, out, saved, scale, kernel, wanted):
    BACKWARDS.append((kernel, out, saved))
    dout, q, k, v, *rest = arrays(dout, q, k, v, mask, mask_bias, pair_bias, gate)
    biases = dict(zip(("mask", "mask_bias", "pair_bias", "gate"), rest, strict=True))
    found = oracle.evoformer_attention_backward(dout, q, k, v, **biases, scale=scale)
    return [
        torch.from_numpy(np.array(x)) if needed and x is not None else torch.empty(0, dtype=DTYPE)
        for x, needed in zip(found, wanted, strict=True)
    ]


DTYPE = torch.float32


@pytest.fixture(autouse=True)
def a_cpu_counts_as_a_gpu(monkeypatch):
    monkeypatch.setattr(evoformer, "whereabouts", lambda x: ("cuda", "sm_90"))
    monkeypatch.setattr(torch_library, "_DECIDED", {})
    BACKWARDS.clear()


@pytest.fixture(params=["cuda-plain", "cuda-tensor"])
def kernel(request, monkeypatch):
    """Each kernel by name, in float32: what it declines is not what these tests are about."""
    chosen = BY_NAME[request.param]
    monkeypatch.setattr(evoformer, "select", lambda call, **asked: chosen)
    return request.param


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


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("without", [(), ("mask", "gate"), ("mask_bias", "pair_bias")])
def test_opcheck(without, return_lse, save, kernel):
    wants = () if BY_NAME[kernel].saved and not save else DIFFERENTIABLE
    made = operands(without=without, requires_grad=wants)
    save = save and bool(BY_NAME[kernel].saved)
    torch.library.opcheck(torch_op.attention, (*made.values(), 0.5, kernel, return_lse, save))


@pytest.mark.parametrize("kept", [False, True])
def test_opcheck_of_the_backward(kept, kernel):
    made = operands(requires_grad=())
    dout = torch.ones_like(made["q"])
    saved = (dout, torch.ones(7, 2, 3, 4, 5, dtype=torch.uint8)) if kept else (None, None)
    wanted = [True, False, True, True, False, True]
    torch.library.opcheck(
        torch_op.attention_backward, (dout, *made.values(), *saved, 0.5, kernel, wanted)
    )


def test_what_is_kept_for_the_backward_is_up_to_the_kernel(kernel):
    made = operands()
    out, lse = evoformer_attention(**made, return_lse=True)
    out.sum().backward()
    ((name, kept_out, saved),) = BACKWARDS
    assert name == kernel
    if kernel == "cuda-plain":
        assert kept_out is None and saved is None
    else:
        assert torch.equal(kept_out, out)
        assert torch.equal(saved, torch.stack([lse.byte()] * 7))


def test_nothing_is_saved_where_no_gradient_is_wanted(kernel, monkeypatch):
    asked = []
    attend = torch_op.attend

    def record(*arguments):
        asked.append(arguments[-2:])
        return attend(*arguments)

    monkeypatch.setattr(torch_op, "attend", record)
    evoformer_attention(**operands(requires_grad=()))
    with torch.no_grad():
        evoformer_attention(**operands(), return_lse=True)
    evoformer_attention(**operands())
    saves = kernel == "cuda-tensor"
    assert asked == [(False, False), (True, False), (False, saves)]


@pytest.mark.parametrize(("return_lse", "save"), [(False, False), (True, False), (True, True)])
def test_fake_tensors_have_the_shapes_of_the_results(return_lse, save):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        made = {
            name: torch.empty(x.shape, dtype=x.dtype if name == "mask" else torch.bfloat16)
            for name, x in operands(requires_grad=()).items()
        }
        made["q"] = made["q"].transpose(0, 1).contiguous().transpose(0, 1)
        out, lse, saved = torch_op.attention(*made.values(), 0.5, "cuda-tensor", return_lse, save)
        gradients = torch_op.attention_backward(
            *(out, *made.values(), out, saved, 0.5, "cuda-tensor", [True] * 6)
        )
    assert out.shape == made["q"].shape and out.is_contiguous() and out.dtype == torch.bfloat16
    assert lse.shape == ((2, 3, 4, 5) if return_lse else (0,))
    assert saved.shape == ((7, 2, 3, 4, 5) if save else (0,))
    assert (lse.dtype, saved.dtype) == (torch.float32, torch.uint8)
    assert [x.shape for x in gradients] == [made[name].shape for name in DIFFERENTIABLE]
    assert {x.dtype for x in gradients} == {torch.bfloat16}


@pytest.mark.parametrize("requires_grad", [DIFFERENTIABLE, ("v",), ("pair_bias", "gate"), ()])
def test_gradients_reach_the_operands_that_want_them(requires_grad, kernel):
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
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dq.sum().backward()


def test_functions_of_tensors_are_differentiated_as_well(kernel):
    made = operands(requires_grad=())

    def loss(q):
        return evoformer_attention(**{**made, "q": q}).square().sum()

    found = torch.func.grad(loss)(made["q"])
    q = made["q"].clone().requires_grad_()
    loss(q).backward()
    torch.testing.assert_close(found, q.grad)


def test_a_call_like_one_before_is_not_looked_at_again(kernel, monkeypatch):
    looked = []
    check = evoformer.evoformer_call
    monkeypatch.setattr(
        evoformer,
        "evoformer_call",
        lambda *args, **asked: looked.append(1) or check(*args, **asked),
    )
    for _ in range(3):
        evoformer_attention(**operands())
    assert len(looked) == 1
    evoformer_attention(**operands(), scale=1)
    with pytest.raises(TypeError, match="scale must be a real number"):
        evoformer_attention(**operands(), scale=True)
    made = operands()
    wrong = {**made, "mask": made["mask"][:, :1]}
    for _ in range(2):  # an error is not remembered
        with pytest.raises(ValueError, match="mask must have S=3"):
            evoformer_attention(**wrong)
    evoformer_attention(**operands(without=("gate",)))
    assert len(looked) == 6


def test_tensors_of_a_class_of_their_own_are_looked_at_each_time(kernel):
    class Own(torch.Tensor):
        pass

    made = operands(requires_grad=())
    mine = {name: x.as_subclass(Own) for name, x in made.items()}
    assert not torch_library.unobserved(mine.values())
    out = evoformer_attention(**mine)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), evoformer_attention(**made))
    assert len(torch_library._DECIDED) == 1


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_compiles_in_one_graph(return_lse, scale, kernel):
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
