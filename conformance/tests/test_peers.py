"""Peers: adapters load without their packages, declare, and put their calls right."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from isoform.conformance.cli import app
from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.torch import aligned as aligned_rows
from isoform.conformance.implementations.torch import merged, score_of
from isoform.conformance.judge import judge, judge_invalid_calls
from isoform.conformance.matrix import Record
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.peers import PEERS
from isoform.conformance.peers.adapter import mask_as_bias
from isoform.conformance.peers.cuequivariance import as_weight, unit_tokens
from isoform.conformance.peers.xformers import aligned
from isoform.conformance.registry import NotHere, _load, find
from isoform.conformance.signatures import SIGNATURES
from isoform.reference.torch import evoformer_attention

CASE = CASES["evoformer/length-17/fp32/all-operands"]


@pytest.mark.parametrize("name", PEERS)
def test_an_adapter_needs_no_package_and_declares_what_the_operation_has(name: str) -> None:
    peer = _load(PEERS[name].target, "torch", None)
    assert isinstance(peer, Implementation)
    assert peer.name == name
    signature = SIGNATURES[peer.operation]
    assert peer.capabilities.operands <= signature.features
    assert peer.capabilities.gradients <= {*signature.differentiable}
    assert ("cpu" in peer.capabilities.devices) == (PEERS[name].where == "cpu")


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.why_not()])
def test_what_cannot_run_here_says_what_it_needs(name: str) -> None:
    with pytest.raises(NotHere, match=f"{name} is not run here: it needs"):
        find(name)
    shown = CliRunner().invoke(app, ["check", name, "--tag", "quick"])
    assert shown.exit_code == 2
    assert "not run here" in " ".join(shown.output.split())


def test_peers_are_listed_and_not_judged_unasked() -> None:
    shown = CliRunner().invoke(app, ["list", "--peers"]).output
    assert all(name in shown for name in PEERS)
    assert not {*PEERS} & {*CliRunner().invoke(app, ["list"]).output.split()}


@pytest.mark.parametrize("name", ["sdpa-math", "transformers-rotary"])
def test_those_that_are_here_run(name: str) -> None:
    peer = find(name)
    case = next(
        case
        for case in OPERATIONS[peer.operation].cases.values()
        if not peer.capabilities.unsupported_reasons(OPERATIONS[peer.operation].call_for(case))
        and not case.large
        and min(vars(case.shape).values()) > 0
    )
    verdicts = {outcome.verdict.value for outcome in judge(peer, case)}
    assert "error" not in verdicts and "pass" in verdicts


# Stand-ins for packages that need a GPU: what they document, written out. They show that an adapter
# hands over what is meant, and brings back what is meant.


def attention(q: Any, k: Any, v: Any, bias: Any, scale: float) -> Any:
    """Heads first."""
    return torch.softmax(scale * q @ k.transpose(-1, -2) + bias, -1) @ v


def ds4sci(q: Any, k: Any, v: Any, biases: list[Any]) -> Any:
    bias = sum(x for x in biases if x is not None)
    heads_first = (x.transpose(2, 3) for x in (q, k, v))
    return attention(*heads_first, bias, q.shape[-1] ** -0.5).transpose(2, 3)


def triangle(q: Any, k: Any, v: Any, bias: Any, mask: Any = None, scale: Any = None) -> Any:
    dropped = 0 if mask is None else torch.where(mask, 0.0, -1e9)
    return attention(q, k, v, bias + dropped, scale)


def pair_bias(
    single: Any, pair: Any, mask: Any, heads: int, norm: Any, _: Any, wq: Any, bq: Any, wk: Any,
    wv: Any, wg: Any, wo: Any, *, attn_scale: float, is_cached_z_proj: bool,
) -> Any:  # fmt: skip
    assert is_cached_z_proj and bq is None
    x = torch.nn.functional.layer_norm(single, single.shape[-1:], norm, eps=1e-5)
    q, k, v = ((x @ w.T).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (wq, wk, wv))
    out = attention(q, k, v, pair + torch.where(mask, 0.0, -1e6)[:, None, None], attn_scale)
    return (out.transpose(1, 2).flatten(2) * torch.sigmoid(x @ wg.T)) @ wo.T, None


def memory_efficient(q: Any, k: Any, v: Any, attn_bias: Any = None, scale: Any = None) -> Any:
    assert attn_bias is None or attn_bias.stride(-2) % 8 == 0
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    bias = 0 if attn_bias is None else attn_bias
    return attention(*heads_first, bias, scale).transpose(1, 2)


def trifast(q: Any, k: Any, v: Any, b: Any, mask: Any) -> Any:
    assert q.shape[2] == q.shape[3]
    dropped = torch.where(mask, torch.finfo(q.dtype).min, 0.0)[:, None, :, None]
    return attention(q, k, v, b[:, :, None] + dropped, q.shape[-1] ** -0.5)


STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {
    "ds4sci": ("deepspeed.ops.deepspeed4science", {"DS4Sci_EvoformerAttention": ds4sci}),
    "cueq-triangle": ("cuequivariance_torch", {"triangle_attention": triangle}),
    "cueq-pair-bias": ("cuequivariance_torch", {"attention_pair_bias": pair_bias}),
    "xformers": ("xformers.ops", {"memory_efficient_attention": memory_efficient}),
    "trifast": ("trifast", {"triangle_attention": trifast}),
}


@pytest.mark.parametrize("rows", [2, 21])
@pytest.mark.parametrize("name", STAND_INS)
def test_the_call_is_put_right(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, contents = STAND_INS[name]
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        stand_in = ModuleType(path)
        stand_in.__path__ = []
        monkeypatch.setitem(sys.modules, path, stand_in)
    vars(sys.modules[module]).update(contents)
    peer = _load(PEERS[name].target, "torch", None)
    given = OPERATIONS[CASE.operation].operands(CASE)
    operands = {
        key: torch.from_numpy(np.ascontiguousarray(x))
        for key, x in given.items()
        if key in ("q", "k", "v") or key in peer.capabilities.operands
    }
    operands = {
        key: x if key == "pair_bias" else x[:, :1].expand(-1, rows, *x.shape[2:]).clone()
        for key, x in operands.items()
    }
    operands["mask"][..., 0] = True  # what a row without a key gets is the peer's own business
    # told as for a CPU: only what the adapter does is looked at
    allowed = peer.capabilities.devices | {"cpu"}
    object.__setattr__(peer.capabilities, "devices", allowed)
    dtypes = peer.capabilities.dtypes
    object.__setattr__(peer.capabilities, "dtypes", dtypes | {"float32"})
    try:
        leaves = {k: x.clone().requires_grad_(x.is_floating_point()) for k, x in operands.items()}
        again = {k: x.clone().requires_grad_(x.is_floating_point()) for k, x in operands.items()}
        for scale in (None, 0.3):
            out = peer.forward(**leaves, scale=scale)
            wanted = evoformer_attention(**again, scale=scale)
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
        floats = [k for k, x in leaves.items() if x.is_floating_point()]
        ours = torch.autograd.grad(out.sin().sum(), [leaves[k] for k in floats])
        theirs = torch.autograd.grad(wanted.sin().sum(), [again[k] for k in floats])
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    finally:
        object.__setattr__(peer.capabilities, "devices", allowed - {"cpu"})
        object.__setattr__(peer.capabilities, "dtypes", dtypes)


def test_the_single_representation_brings_operands_through_a_layer_norm() -> None:
    x = torch.randn(11, 2, 3)
    single, norm = unit_tokens(11, x)
    normed = torch.nn.functional.layer_norm(single, single.shape[-1:], norm, eps=1e-5)
    torch.testing.assert_close(normed @ as_weight(x).T, x.flatten(1), rtol=1e-5, atol=1e-6)


def test_a_score_function_indexes_what_it_was_given_and_does_nothing_else_to_it() -> None:
    """A bias that is reshaped in it has no gradient: FlexAttention's compiler refuses it."""
    k, mask = torch.zeros(2, 3, 5, 1, 4), torch.ones(2, 3, 5, dtype=torch.bool)
    mask_bias = torch.randn(2, 3, 1, 1, 5, requires_grad=True)
    pair_bias = torch.randn(2, 1, 2, 7, 5, requires_grad=True)
    score = score_of(k, mask, mask_bias, pair_bias)
    called: list[str] = []

    class Watched(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(function.__name__)
            return function(*args, **(kwargs or {}))

    row, head, query, key = map(torch.tensor, (4, 1, 6, 2))
    with Watched():
        found = score(torch.tensor(0.5), row, head, query, key)
    assert found.item() == pytest.approx(
        0.5 + (mask_bias[1, 1, 0, 0, 2] + pair_bias[1, 0, 1, 6, 2]).item(), abs=1e-6
    )
    assert {*called} <= {"__getitem__", "tensor", "add", "__floordiv__", "floor_divide", "where"}
    assert called.count("__getitem__") == 3


def test_what_a_block_cannot_hold_is_declined() -> None:
    """trifast's kernels have a head dim in a block of Triton's, whose sizes are powers of two."""
    declared = _load(PEERS["trifast"].target, "torch", None).capabilities
    call = OPERATIONS["evoformer_attention"].call_for(
        CASES["evoformer/af3-diffusion-small/bf16/ragged-mask"], device="cuda"
    )
    assert declared.unsupported_reasons(call) == ("head dim D=48 (powers of two only)",)
    for D in (16, 32, 64, 128):
        assert not declared.unsupported_reasons(replace(call, shape=replace(call.shape, D=D)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_mask_is_a_bias_in_every_dtype(dtype: torch.dtype) -> None:
    """In float16 too, whose least number is greater than what a dropped key gets."""
    mask = torch.tensor([[[True, False]]])
    for given, kept in ((None, 0), (torch.ones(1, 1, 1, 1, 2, dtype=dtype), 1)):
        bias = mask_as_bias(mask, given, dtype, -1e9)
        assert bias is not None
        assert (bias.shape, bias.dtype) == ((1, 1, 1, 1, 2), dtype)
        assert bias[..., 0].item() == kept and bias[..., 1].item() < -6e4
    assert mask_as_bias(None, None, dtype, -1e9) is None


def test_a_bias_is_aligned() -> None:
    bias = torch.randn(2, 3, 5, 13)
    assert aligned(None) is None
    laid = aligned(bias)
    assert laid is not None and laid.stride(-2) == 16 and torch.equal(laid, bias)


def test_one_mask_is_made_of_all_in_which_a_dropped_key_stays_dropped() -> None:
    q = torch.zeros(1, 2, 3, 2, 4, dtype=torch.bfloat16)
    mask = torch.tensor([[[True, False], [True, True]]])
    pair_bias = torch.full((1, 1, 2, 3, 2), torch.inf, dtype=q.dtype)
    mask_bias = torch.ones(1, 2, 1, 1, 2, dtype=q.dtype)
    for biases in ((None, pair_bias), (mask_bias, pair_bias), (mask_bias, None), (None, None)):
        found = merged(q, mask, *biases)
        assert found is not None
        assert (found.shape, found.dtype) == ((2, 2, 3, 2), q.dtype)
        assert (found[0, ..., 1] == -torch.inf).all()
        assert (found[1] > -torch.inf).all()
    assert merged(q, None, None, None) is None
    alone = merged(q, None, mask_bias, None)
    assert alone is not None
    assert (alone == 1).all()


def test_a_record_says_what_was_not_run_and_how_far_a_peer_came(tmp_path: Path) -> None:
    """One whose package is missing, one that is given no time, and one that is."""
    root, record = Path(__file__).parents[2], tmp_path / "peers.jsonl"
    program = [sys.executable, "ci/peers.py", str(record), "sdpa-math"]
    case = ["--jobs", "1", "--case", "evoformer/length-1/fp32/bare"]
    for more in (["trifast", *case, "--minutes", "0"], case):
        subprocess.run([*program, *more], cwd=root, check=True, capture_output=True, timeout=240)
    late, absent, seen = map(Record.from_json, map(json.loads, record.read_text().splitlines()))
    assert "was not seen to answer: 0 minutes were up" in late.not_run
    assert "needs trifast" in absent.not_run
    assert seen.environment["cases"].startswith("evoformer/length-1/fp32/bare: 1 of ")
    assert "ended" not in seen.environment
    assert seen.cells["length"].counts["pass"] > 0


def test_what_does_not_lie_on_16_bytes_is_told() -> None:
    wide = torch.zeros(5, 4, 25, dtype=torch.bfloat16)
    assert aligned_rows(wide[..., :8]) is False  # rows of 50 bytes
    assert aligned_rows(torch.zeros(5, 4, 8, dtype=torch.bfloat16))
    assert aligned_rows(torch.zeros(400, dtype=torch.bfloat16)[1:385].view(3, 16, 8)) is False
    assert aligned_rows(torch.zeros(5, 8, 4, dtype=torch.float32).transpose(1, 2)) is False
    assert aligned_rows(torch.zeros(1, 1, 3, dtype=torch.bfloat16))


def test_axes_that_are_as_long_are_no_wrong_call_when_exchanged() -> None:
    """A kernel of squares alone is not asked to refuse its pair bias transposed."""
    square = replace(
        find("sdpa-math"),
        capabilities=replace(find("sdpa-math").capabilities, cross_lengths=False),
    )
    asked = {outcome.check for outcome in judge_invalid_calls(square)}
    everything = {outcome.check for outcome in judge_invalid_calls(find("sdpa-math"))}
    assert everything - asked == {"invalid/pair_bias: queries and keys exchanged"}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_peer_over_ranks_says_how_many_gpus_are_missing(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    over = [peer for peer in PEERS.values() if peer.where == "ranks"]
    assert {"torch-context-parallel", "deepspeed-ulysses"} <= {peer.name for peer in over}
    for peer in over:
        here = replace(peer, packages={})
        said = f"needs 2 GPUs, one for each rank, joined by NCCL: PyTorch sees {count} here"
        assert here.why_not() == ("" if count == 2 else said)
        lacking = replace(peer, packages={"no_such_module": "no-such-package"})
        assert lacking.why_not() == "needs no-such-package: pip install no-such-package"


def test_peers_over_ranks_are_on_gpus_with_equal_shards() -> None:
    for peer in (each for each in PEERS.values() if each.where == "ranks"):
        spread = _load(peer.target, "torch", None).spread
        assert spread is not None
        assert (spread.ranks.size, spread.ranks.device) == (2, "cuda")
        multiple = {"contiguous": 2, "zigzag": 4}[spread.kind]
        assert spread.declared.length_multiple == multiple


@pytest.mark.parametrize("causal", [True, False])
def test_what_a_peers_backward_is_done_in_is_what_its_forward_is(causal: bool) -> None:
    from contextlib import contextmanager

    from isoform.conformance.peers.sequence import _local, _vjp

    entered: list[bool] = []

    @contextmanager
    def within(q: Any, causal: bool) -> Any:
        entered.append(causal)
        yield
        entered.append(causal)

    # strides that NCCL does not send
    q, k, v = (torch.randn(1, 6, 4, 8).transpose(2, 3) for _ in range(3))
    called = {"comm": None, "sharding": None, "causal": causal, "within": within}
    out, backward = _vjp(_local, q, k, v, **called)
    assert len(entered) == 2
    gradients = backward(torch.ones_like(out))
    assert entered == 4 * [causal]
    assert [x.shape for x in gradients] == 3 * [q.shape]


def test_a_peer_whose_compiled_part_is_not_loaded_is_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = ModuleType("xformers")
    monkeypatch.setitem(sys.modules, "xformers", fake)
    peer = replace(PEERS["xformers"], packages={}, where="cpu")
    for loaded in (True, False):
        fake._has_cpp_library = loaded  # type: ignore[attr-defined]
        assert ("does not load its compiled part" in peer.why_not()) != loaded
