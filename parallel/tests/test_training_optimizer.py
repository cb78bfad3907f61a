"""AdamW by name: the numbers of PyTorch, float32 copies of 16 bits, states saved and read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isoform.parallel.training import precision
from isoform.parallel.training.optimizer import NamedAdamW


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = {"table": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "linear": nn.Linear(4, 3)}
    return nn.ModuleDict(layers).to(dtype)


def gradients(of: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in of.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def new(of: nn.Module) -> NamedAdamW:
    return NamedAdamW(of, betas=(0.8, 0.9), weight_decay=0.5)


@pytest.mark.parametrize("chunk", [1, 13, 10**6])
def test_numbers_are_those_of_pytorch(chunk, monkeypatch):
    monkeypatch.setattr(precision, "CHUNK", chunk)
    ours, theirs = model(), model()
    mine = new(ours)
    groups = [
        {"params": [theirs["linear"].weight], "weight_decay": 0.5},
        {
            "params": [p for n, p in theirs.named_parameters() if n != "linear.weight"],
            "weight_decay": 0.0,
        },
    ]
    expected = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    for step, (rate, scale) in enumerate(((0.1, 1.0), (0.02, 0.25), (0.3, 1.0))):
        gradients(ours, step)
        gradients(theirs, step)
        for group in expected.param_groups:
            group["lr"] = rate
        for p in theirs.parameters():
            p.grad *= scale
        mine.step(rate, scale)
        expected.step()
        assert all(p.grad is None for p in ours.parameters())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def test_sixteen_bits_follow_a_copy_of_more():
    short, wide = model(torch.bfloat16), model(torch.bfloat16).float()
    mine, expected = new(short), new(wide)
    before = [p.clone() for p in short.parameters()]
    for step in range(200):  # each far less than a parameter can hold
        gradients(short, step % 3)
        for p, q in zip(short.parameters(), wide.parameters(), strict=True):
            q.grad = p.grad.float()
        mine.step(1e-5)
        expected.step(1e-5)
    moved = 0
    for p, q, old in zip(short.parameters(), wide.parameters(), before, strict=True):
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, q.to(torch.bfloat16))
        moved += int((p != old).sum())
    assert moved > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_saved_and_read(dtype):
    one, other = model(dtype), model(dtype)
    first, second = new(one), new(other)
    assert all(not x.any() for own in first.state().values() for x in own.values())
    for step in range(2):
        gradients(one, step)
        first.step(0.1)
    saved = {name: {k: x.clone() for k, x in own.items()} for name, own in first.state().items()}
    assert saved.keys() == dict(one.named_parameters()).keys()
    assert saved["norm.bias"]["step"] == 2
    second.load({name: x.clone() for name, x in first.copies.items()}, saved)
    assert {x.dtype for x in second.copies.values()} == {torch.float32}
    for step in (2, 3):
        for each, stepped in ((one, first), (other, second)):
            gradients(each, step)
            stepped.step(0.1)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_has_no_gradient_stays():
    given = model()
    mine = new(given)
    before = given["table"].weight.clone()
    given["linear"].weight.grad = torch.ones(3, 4)
    mine.step(0.1)
    assert torch.equal(given["table"].weight, before)
    assert mine.state()["table.weight"]["step"] == 0
