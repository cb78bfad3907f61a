"""Capture: what is recorded is what the model computed with, and nothing else happens to it."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from isoform.conformance import capture as module
from isoform.conformance.capture import capture, recorded
from isoform.conformance.frameworks import framework
from isoform.conformance.replay import read
from isoform.reference.torch import evoformer_attention, evoformer_attention_tiled
from isoform.reference.torch.evoformer_stack import EvoformerStack

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TORCH = framework("torch")


def operands(dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> dict[str, Tensor]:
    """All operands, with B=2, S=3, Q=5, K=7, H=4, G=2, D=8; none of them contiguous."""
    torch.manual_seed(1)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape[::-1]).to(dtype).permute(*range(len(shape))[::-1])
        return x.requires_grad_(requires_grad)

    return {
        "q": draw(2, 3, 5, 4, 8),
        "k": draw(2, 3, 7, 2, 8),
        "v": draw(2, 3, 7, 2, 8),
        "mask": torch.rand(2, 3, 7) < 0.8,
        "mask_bias": draw(2, 3, 1, 1, 7),
        "pair_bias": draw(2, 1, 4, 5, 7),
        "gate": draw(2, 3, 5, 4, 8),
    }


def recording(path: Any, index: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """One call of a file, and its tensors."""
    found = read(path)
    call = found.calls[index]
    return call, TORCH.upload(found.tensors(call), "cpu")


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def stack(**more: Any) -> EvoformerStack:
    torch.manual_seed(2)
    sizes = {"c_outer": 4, "c_multiplication": 8, "c_triangle": 8, "heads_triangle": 2}
    return EvoformerStack(1, 16, 8, 8, c=8, heads=2, **sizes, **more)


def activations() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(1, 3, 6, 16), torch.randn(1, 6, 6, 8)


# What is recorded


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_comes_back_bit_by_bit(tmp_path, dtype):
    given = operands(dtype)
    with capture(tmp_path / "a.safetensors"):
        out = recorded(evoformer_attention)(**given, scale=0.3)
        dout = torch.randn(*out.shape).to(dtype)
        out.backward(dout)
    call, found = recording(tmp_path / "a.safetensors")
    assert call.scale == 0.3 and call.gradient and call.device == "cpu" and call.notes == ()
    assert call.function == "isoform.reference.torch.evoformer.evoformer_attention"
    assert found.keys() == given.keys() | {"dout"}
    assert all(same(found[name], x) for name, x in (given | {"dout": dout}).items())


def test_absent_operands_stay_absent(tmp_path):
    given = {name: x for name, x in operands().items() if name in ("q", "k", "v", "gate")}
    with capture(tmp_path / "a.safetensors"), torch.no_grad():
        recorded(evoformer_attention)(**given, mask=None)
    call, found = recording(tmp_path / "a.safetensors")
    assert call.scale is None and not call.gradient
    assert found.keys() == {"q", "k", "v", "gate"}


def test_the_result_and_the_gradients_are_those_of_the_function(tmp_path):
    plain, spied = operands(), operands()
    expected = evoformer_attention(**plain, return_lse=True)
    expected[0].sum().backward()
    with capture(tmp_path / "a.safetensors"):
        found = recorded(evoformer_attention)(**spied, return_lse=True)
        found[0].sum().backward()
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    assert all(same(plain[x].grad, spied[x].grad) for x in plain if x != "mask")
    call, tensors = recording(tmp_path / "a.safetensors")
    assert same(tensors["dout"], torch.ones(2, 3, 5, 4, 8))
    assert call.notes == ("a gradient through lse, if there was one, was not captured",)


def test_operands_are_recorded_as_they_were_before_the_call(tmp_path):
    def destroys(q, k, v):
        out = evoformer_attention(q, k, v)
        q.zero_()
        return out

    given = {name: x for name, x in operands(requires_grad=False).items() if name in "qkv"}
    before = given["q"].clone()
    with capture(tmp_path / "a.safetensors"):
        recorded(destroys)(**given)
    assert same(recording(tmp_path / "a.safetensors")[1]["q"], before)


def test_the_gradient_is_that_of_all_uses_and_of_the_first_backward(tmp_path):
    given = operands()
    with capture(tmp_path / "a.safetensors"):
        out = recorded(evoformer_attention)(**given)
        loss = (2 * out).sum() + (3 * out).sum()
        loss.backward(retain_graph=True)
        (7 * loss).backward()
    assert same(recording(tmp_path / "a.safetensors")[1]["dout"], torch.full((2, 3, 5, 4, 8), 5.0))


def test_a_gradient_that_comes_later_is_not_recorded(tmp_path):
    with capture(tmp_path / "a.safetensors") as session:
        out = recorded(evoformer_attention)(**operands())
    out.sum().backward()
    assert not read(tmp_path / "a.safetensors").calls[0].gradient
    assert not session.calls[0].gradient


# What is seen


def test_a_model_is_seen_through_and_left_as_it_was(tmp_path):
    model, given = stack(), activations()
    before = [dict(vars(layer)) for layer in model.modules()]
    expected = model(*given)
    with capture(tmp_path / "a.safetensors"):
        msa, pair, _ = model(*given)
        (msa.sum() + pair.square().sum()).backward()
    names = [call.module for call in read(tmp_path / "a.safetensors").calls]
    layers = ["msa_row", "msa_column", "triangle_starting", "triangle_ending"]
    assert names == [f"EvoformerStack.blocks.0.{layer}" for layer in layers]
    assert all(call.gradient for call in read(tmp_path / "a.safetensors").calls)
    assert same(msa, expected[0]) and same(pair, expected[1])
    assert [dict(vars(layer)) for layer in model.modules()] == before


def test_names_in_python_modules_are_seen_and_restored(tmp_path):
    functions = evoformer_attention, functional.scaled_dot_product_attention
    q = torch.randn(1, 2, 3, 4, 8)
    with capture(tmp_path / "a.safetensors") as session:
        evoformer_attention(q, q, q)  # this module's own name
        functional.scaled_dot_product_attention(q, q, q)
    assert len(session.calls) == 2
    assert functions == (evoformer_attention, functional.scaled_dot_product_attention)
    evoformer_attention(q, q, q)
    assert len(session.calls) == 2


def test_functions_of_the_user_are_seen(tmp_path):
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = mine

        def forward(self, x: Tensor) -> Tensor:
            return self.op(x, x, v=x, window=3)

    def mine(q, k, v, *, window):
        return evoformer_attention(q, k, v)

    with capture(tmp_path / "a.safetensors", functions=[mine]) as session:
        Layer()(torch.randn(1, 2, 3, 4, 8))
    (call,) = session.calls
    assert call.module == "Layer" and call.function.endswith("mine")
    assert call.notes == ("further arguments were not captured: window",)


def test_a_call_within_a_call_is_part_of_it(tmp_path):
    tiled = recorded(partial(evoformer_attention_tiled, block_q=2))
    with capture(tmp_path / "a.safetensors") as session:
        tiled(**operands()).sum().backward()
    (call,) = session.calls
    assert call.gradient and call.function.endswith("evoformer_attention_tiled")


def test_what_checkpointing_repeats_is_left_out(tmp_path):
    given = operands()
    with capture(tmp_path / "a.safetensors") as session:
        out = checkpoint(lambda: evoformer_attention(**given), use_reentrant=False)
        out.sum().backward()
    assert len(session.calls) == 1 and session.calls[0].gradient
    assert [left.reason for left in session.left_out] == ["recomputed in the backward pass"]


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_is_seen(tmp_path, training):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    with capture(tmp_path / "a.safetensors") as session, torch.set_grad_enabled(training):
        layer(torch.randn(2, 7, 16))
    (call,) = session.calls
    assert call.module == "TransformerEncoderLayer.self_attn"
    assert torch.backends.mha.get_fastpath_enabled()


def test_modules_can_be_picked(tmp_path):
    with capture(tmp_path / "a.safetensors", modules=["*.msa_*"]) as session:
        stack()(*activations())
    assert [call.module.rpartition(".")[2] for call in session.calls] == ["msa_row", "msa_column"]
    assert session.left_out == ()


def test_all_threads_are_seen(tmp_path):
    model, given = stack(), activations()
    with capture(tmp_path / "a.safetensors") as session:
        threads = [threading.Thread(target=model, args=given) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    names = [call.module for call in session.calls]
    assert len(names) == 12 and all(names.count(name) == 3 for name in names)


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
def test_compiled_code_runs_unseen_unless_it_is_run_eagerly(tmp_path):
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(x, x, x)

    compiled, x = torch.compile(Layer(), backend="eager"), torch.randn(2, 4, 5, 8)
    with capture(tmp_path / "a.safetensors") as session:
        found = compiled(x)
        assert session.calls == ()
        with torch.compiler.set_stance("force_eager"):
            assert same(compiled(x), found)
    (call,) = session.calls
    assert call.module.endswith("_orig_mod")


# scaled_dot_product_attention

MASKS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, str | None, tuple[int, int]]] = {
    # leading axes of q, shape of attn_mask, the operand it becomes, B and S
    "none": ((3, 4), None, None, (1, 3)),
    "keys": ((3, 4), (3, 1, 1, 7), "mask", (1, 3)),
    "query and key": ((3, 4), (5, 7), "pair_bias", (1, 3)),
    "head, query and key": ((3, 4), (1, 4, 5, 7), "pair_bias", (1, 3)),
    "everything": ((3, 4), (3, 4, 5, 7), "pair_bias", (3, 1)),
    "batch, query and key": ((3, 4), (3, 1, 5, 7), "pair_bias", (3, 1)),
    "one key for all": ((3, 4), (5, 1), "pair_bias", (1, 3)),
    "rows and keys": ((2, 3, 4), (2, 3, 1, 1, 7), "mask", (2, 3)),
    "batch and keys": ((2, 3, 4), (2, 1, 1, 1, 7), "mask", (2, 3)),
    "pair": ((2, 3, 4), (2, 1, 4, 5, 7), "pair_bias", (2, 3)),
    "pair of one": ((2, 3, 4), (1, 1, 4, 5, 7), "pair_bias", (1, 6)),
    "rows, query and key": ((2, 3, 4), (2, 3, 1, 5, 7), "pair_bias", (6, 1)),
    "second axis": ((2, 3, 4), (1, 3, 4, 5, 7), "pair_bias", (6, 1)),
    "no heads": ((3,), (3, 5, 7), "pair_bias", (3, 1)),
    "no heads, shared": ((3,), (5, 7), "pair_bias", (1, 3)),
    "no batch": ((), (5, 7), "pair_bias", (1, 1)),
    "no batch, no mask": ((), None, None, (1, 1)),
}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", MASKS)
def test_sdpa_is_translated(tmp_path, name, kind):
    axes, shape, operand, rows = MASKS[name]
    torch.manual_seed(4)
    q, k, v = (torch.randn(*axes, length, 8, requires_grad=True) for length in (5, 7, 7))
    mask = None if shape is None else torch.randn(shape)
    if kind == "bool" and mask is not None:
        mask = mask > -0.7
    elif operand == "mask":
        operand = "mask_bias"
    with capture(tmp_path / "a.safetensors"):
        out = functional.scaled_dot_product_attention(q, k, v, mask, scale=0.4)
        dout = torch.randn_like(out)
        out.backward(dout)
    call, found = recording(tmp_path / "a.safetensors")
    given = found.pop("dout")
    assert found.keys() == {"q", "k", "v"} | ({operand} if operand else set())
    assert found["q"].shape[:2] == rows

    leaves = {key: found[key].requires_grad_() for key in "qkv"}
    again = evoformer_attention(**found | leaves, scale=call.scale)
    again.backward(given)
    heads = again.transpose(2, 3)
    torch.testing.assert_close(heads.reshape(out.shape), out)
    torch.testing.assert_close(leaves["k"].grad.transpose(2, 3).reshape(k.shape), k.grad)
    torch.testing.assert_close(given.transpose(2, 3).reshape(out.shape), dout)


def test_an_expanded_mask_is_what_it_was_expanded_from(tmp_path):
    q = torch.randn(6, 4, 5, 8)
    pair = torch.randn(4, 5, 5).expand(6, 4, 5, 5)
    keys = (torch.rand(6, 1, 1, 5) < 0.8).expand(6, 4, 5, 5)
    with capture(tmp_path / "a.safetensors"):
        functional.scaled_dot_product_attention(q, q, q, pair)
        functional.scaled_dot_product_attention(q, q, q, keys)
    assert recording(tmp_path / "a.safetensors", 0)[1]["pair_bias"].shape == (1, 1, 4, 5, 5)
    assert recording(tmp_path / "a.safetensors", 1)[1]["mask"].shape == (1, 6, 5)


def test_causal_and_grouped_sdpa(tmp_path):
    q, k, v = (torch.randn(2, heads, length, 8) for heads, length in ((4, 5), (2, 7), (2, 7)))
    with capture(tmp_path / "a.safetensors"):
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    call, found = recording(tmp_path / "a.safetensors")
    assert call.notes == ("is_causal became a pair bias of 0 and −inf",)
    again = evoformer_attention(**found).transpose(2, 3)
    torch.testing.assert_close(again.reshape(out.shape), out)


def test_sdpa_under_autocast_is_recorded_as_it_was_computed(tmp_path):
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    bias = torch.randn(5, 5)
    with capture(tmp_path / "a.safetensors"), torch.autocast("cpu", torch.bfloat16):
        out = functional.scaled_dot_product_attention(q, q, q, bias)
        out.sum().backward()
    call, found = recording(tmp_path / "a.safetensors")
    assert out.dtype == torch.bfloat16 and call.gradient
    assert all(x.dtype == torch.bfloat16 for x in found.values())
    assert call.notes == ("autocast to bfloat16",)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dropout_p": 0.5}, "dropout_p=0.5 makes the result random"),
        ({"value": torch.randn(2, 4, 5, 6)}, "not a call of the contract: v must have D=8"),
        ({"key": torch.randn(1, 4, 5, 8)}, "the leading axes of query, key and value differ"),
        ({"query": torch.randn(2, 4, 5, 8, device="meta")}, "query is nested, sparse or without"),
    ],
)
def test_what_the_contract_does_not_know_is_left_out_with_the_reason(tmp_path, arguments, reason):
    x = torch.randn(2, 4, 5, 8, device=arguments.get("query", torch.empty(0)).device)
    given = {"query": x, "key": x, "value": x} | arguments
    path = tmp_path / "a.safetensors"
    with pytest.warns(UserWarning, match="nothing was captured"), capture(path) as session:
        functional.scaled_dot_product_attention(**given)
    (left,) = read(tmp_path / "a.safetensors").left_out
    assert left.reason.startswith(reason) and left.calls == 1
    assert reason in session.summary()


# Limits, and what goes wrong


def test_limits_are_kept_and_said(tmp_path):
    with capture(tmp_path / "a.safetensors", max_calls=3) as session:
        stack()(*activations())
    assert len(session.calls) == 3
    assert session.left_out[0].module.endswith("triangle_ending")
    assert session.left_out[0].reason == "max_calls=3 was reached"

    size = sum(x.numel() * x.element_size() for x in operands().values())
    with capture(tmp_path / "b.safetensors", max_bytes=2 * size) as session, torch.no_grad():
        for _ in range(5):
            evoformer_attention(**operands())
    assert len(session.calls) == 2
    assert session.left_out[0].reason == f"max_bytes={2 * size} would be exceeded"
    assert session.left_out[0].calls == 3
    assert (tmp_path / "b.safetensors").stat().st_size < 2 * size + 4000


def test_an_interrupted_capture_keeps_what_it_has(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ZeroDivisionError), capture(path):
        1 / (evoformer_attention(**operands()).ndim - 5)
    assert len(read(path).calls) == 1
    assert read(path).interrupted == "ZeroDivisionError: division by zero"
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), capture(path):
        1 / 0  # noqa: B018
    assert path.read_bytes() == before
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_text("an older file")

    def fails(tensors, partial_path, metadata):
        partial_path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", fails)
    with pytest.raises(OSError, match="disk full"), capture(path):
        evoformer_attention(**operands())
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "an older file"


def test_a_call_that_raises_is_not_recorded(tmp_path):
    given = operands()
    with capture(tmp_path / "a.safetensors") as session:
        with pytest.raises(ValueError, match="block_q"):
            evoformer_attention_tiled(**given, block_q=0)
        with pytest.raises(ValueError, match="mask must have 3 axes"):
            evoformer_attention(**given | {"mask": given["mask"][0]})
        evoformer_attention(**given)
    assert len(session.calls) == 1


def test_one_capture_at_a_time(tmp_path):
    with capture(tmp_path / "a.safetensors"):
        with pytest.raises(RuntimeError, match=r"a capture to .* is active already"):
            capture(tmp_path / "b.safetensors").__enter__()
        evoformer_attention(**operands())
    with capture(tmp_path / "b.safetensors"):
        evoformer_attention(**operands())
    assert len(read(tmp_path / "b.safetensors").calls) == 1


def test_no_call_is_a_warning(tmp_path):
    path, says = tmp_path / "a.safetensors", r"nothing was captured .*recorded wraps a function"
    with pytest.warns(UserWarning, match=says), capture(path):
        torch.randn(2) @ torch.randn(2)
    assert read(path).calls == ()


def test_tensors_that_hold_no_numbers_are_left_to_the_model(tmp_path):
    x = torch.randn(3, 1, 2, 3, 4, 8)
    with capture(tmp_path / "a.safetensors") as session:
        torch.func.vmap(recorded(evoformer_attention))(x, x, x)
        recorded(lambda q, k, v: None)("q", "k", "v")
        evoformer_attention(x[0], x[0], x[0])
    assert len(session.calls) == 1
    reasons = [left.reason for left in session.left_out]
    assert reasons == ["q is inside a torch.func transform", "q is of type str"]
