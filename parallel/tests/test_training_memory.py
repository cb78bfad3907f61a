"""What goes to the host and comes back, what is counted, and steps of 16-bit parameters."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isoform.parallel.training import offload
from isoform.parallel.training.memory import Counted
from isoform.parallel.training.model import build
from isoform.parallel.training.offload import Offload
from isoform.parallel.training.precision import MasterAdamW
from isoform.parallel.training.switches import EVERYTHING, Switches

# --- offload, its streams played by fakes that write down what is queued ---


class Streams:
    """``torch.cuda`` as far as offload calls it; copies are done when the host waits for them."""

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []
        self.queued: list[Any] = []
        self.current = FakeStream(self, "compute")
        self.names = iter(("out", "back"))

    def Stream(self, device: Any) -> FakeStream:  # noqa: N802
        return FakeStream(self, next(self.names))

    def current_stream(self, device: Any) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, one: FakeStream) -> Any:
        before, self.current = self.current, one
        yield
        self.current = before


class FakeStream:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def wait_stream(self, other: FakeStream) -> None:
        self.streams.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: FakeEvent) -> None:
        self.streams.log.append((self.name, "waits for", event.name))
        event.synchronize()

    def record_event(self) -> FakeEvent:
        return FakeEvent(self.streams, f"copy {self.name}")


class FakeEvent:
    """Done when it is waited for, and everything that was queued before it."""

    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name, self.mark = streams, name, len(streams.queued)

    def synchronize(self) -> None:
        for i, do in enumerate(self.streams.queued[: self.mark]):
            if do is not None:
                do()
                self.streams.queued[i] = None


@pytest.fixture
def streams(monkeypatch):
    """As if the processor were a GPU that copies late."""
    fakes = Streams()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fakes, name))
    monkeypatch.setattr(offload, "_on_gpu", lambda device: True)
    monkeypatch.setattr(offload, "_locked", lambda n: torch.full((n,), 7, dtype=torch.uint8))

    def copy(self: Any, pieces: list[Tensor], flat: Tensor, back: bool = False) -> None:
        fakes.log.append((fakes.current.name, "copies", "back" if back else "out"))
        sizes = [p.numel() for p in pieces]

        def do() -> None:
            for piece, part in zip(pieces, torch.split(flat, sizes), strict=True):
                part.copy_(piece) if back else piece.copy_(part)

        fakes.queued.append(do)

    monkeypatch.setattr(offload._Kept, "_copy", copy)
    return fakes


def gradients(training_programs: Any, switches: Switches, layers: int = 4) -> dict[str, Tensor]:
    c = training_programs.configuration(layers=layers)
    case = training_programs.Case(switches, c)
    one = build(c, switches, dtype=torch.float64, weights=case.weights())
    one(case.tokens()).backward()
    return {name: p.grad for name, p in one.named_parameters()}


def test_copies_that_are_late_are_waited_for(training_programs, streams):
    right = gradients(training_programs, EVERYTHING.but(checkpointing="blocks"))
    assert streams.log == []
    found = gradients(training_programs, EVERYTHING)
    for name, g in right.items():
        assert torch.equal(found[name], g), name
    copied_out = ("out", "waits for", "compute"), ("out", "copies", "out")
    assert streams.log[:6] == [*copied_out * 3]  # of 4 blocks, all but the last
    wanted, sent = ("compute", "waits for", "copy back"), ("back", "copies", "back")
    after = [entry for entry in streams.log[6:] if entry in (wanted, sent)]
    # that of the third block has not left; others are under way when the block after begins
    assert after == [sent, wanted, sent, wanted]


def test_a_copy_that_is_not_waited_for_is_seen(training_programs, streams, monkeypatch):
    right = gradients(training_programs, EVERYTHING.but(checkpointing="blocks"))
    monkeypatch.setattr(FakeStream, "wait_event", lambda self, event: None)
    found = gradients(training_programs, EVERYTHING)
    assert not all(torch.equal(found[name], g) for name, g in right.items())


def test_no_more_than_two_inputs_wait_to_be_copied(streams):
    kept_alive = Offload()
    with kept_alive.hooks():
        x = torch.ones(3, requires_grad=True)
        y, held = x, []
        for _ in range(5):
            y = y * y  # saves y
            held.append(y)
    alive = [one for one in streams.queued if one is not None]
    assert len(alive) == 1


def test_large_tensors_are_cut(monkeypatch):
    monkeypatch.setattr(offload, "CHUNK", 64)
    for n in (0, 1, 64, 65, 640, 1000):
        assert sum(offload._cut(n)) == n and all(0 < piece <= 64 for piece in offload._cut(n))
    keep = Offload()
    x = torch.randn(10, 13, requires_grad=True)
    with keep.hooks():
        y = (x.T * 2).exp()
    assert keep.bytes_held == 10 * 13 * 4
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * y.detach().T)
    del y
    assert keep.bytes_held == 0


def test_parameters_and_integers_stay():
    keep = Offload()
    weight = torch.nn.Parameter(torch.ones(3))
    with keep.hooks():
        (weight * weight).sum()
        weight[torch.tensor([1, 2])].sum()
    assert keep.most_held == 0


def test_what_was_written_in_between_is_another_tensor():
    keep = Offload()
    x = torch.ones(4, requires_grad=True)
    with keep.hooks():
        y = x * 1
        a = y.exp()
        b = a * a  # a is saved by exp, and twice by the product
        assert keep.bytes_held == 16
        with torch.no_grad():
            a += 1
        c = a * a
        assert keep.bytes_held == 32
        del b, c


# --- the count ---


def test_the_count_is_of_what_is_held():
    before = torch.ones(100)
    with Counted() as count:
        x = torch.ones(10)  # 40 bytes
        view, same = x[2:], before.add_(1)
        assert (count.now, count.most) == (40, 40)
        y = x + view.sum()
        assert count.now == 80
        del x, view, same
        assert count.now == 40
        z = torch.from_numpy(np.ones(9)) * 1
        assert count.now == 40 + 72
        del y, z
    assert count.now == 0 and count.most >= 112


def test_the_limit_is_one():
    with Counted(limit=100), pytest.raises(torch.OutOfMemoryError, match="104 bytes are held, of"):
        torch.ones(26)


def test_what_is_on_the_host_does_not_count(training_programs):
    """With offload the peak of 12 blocks is that of 4, and without it is not."""

    def peak(layers: int, checkpointing: Any) -> int:
        c = training_programs.configuration(layers=layers)
        switches = EVERYTHING.but(tile=8, checkpointing=checkpointing)
        case = training_programs.Case(switches, c, L=256)
        one = build(c, switches, dtype=torch.float64, weights=case.weights())
        for p in one.parameters():
            p.grad = torch.zeros_like(p)
        with Counted() as count:
            one(case.tokens()).backward()
        return count.most

    assert peak(12, "offloaded") == pytest.approx(peak(4, "offloaded"), rel=0.02)
    assert peak(12, "blocks") - peak(4, "blocks") == pytest.approx(8 * 2 * 256 * 40 * 8, rel=0.02)


# --- steps of 16-bit parameters ---


def test_in_float32_it_is_adamw():
    torch.manual_seed(0)
    mine, theirs = (torch.nn.Parameter(torch.arange(7.0)) for _ in range(2))
    other = torch.nn.Parameter(torch.ones(2))
    ours, right = MasterAdamW([mine, other], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for _ in range(5):
        for p, optimizer in ((mine, ours), (theirs, right)):
            optimizer.zero_grad()
            (p**3).sum().backward()
            optimizer.step()
    assert torch.equal(mine, theirs)
    assert torch.equal(other, torch.ones(2))


def test_small_steps_of_bfloat16_are_not_lost():
    p, plain = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    options = {"lr": 1e-4, "weight_decay": 0.0}
    for one, optimizer in (
        (p, MasterAdamW([p], **options)),
        (plain, torch.optim.AdamW([plain], **options)),
    ):
        for _ in range(200):
            one.grad = torch.ones_like(one)
            optimizer.step()
    assert torch.equal(plain, torch.ones_like(plain))  # what would be
    torch.testing.assert_close(p.float(), torch.full((3,), 0.98), rtol=4e-3, atol=0)


def test_it_goes_on_from_where_it_was(monkeypatch):
    from isoform.parallel.training import precision

    monkeypatch.setattr(precision, "CHUNK", 4)  # several chunks

    def begun() -> tuple[list[torch.nn.Parameter], MasterAdamW]:
        ps = [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (3, 2, 5)]
        return ps, MasterAdamW(ps, lr=1e-2)

    def step(ps: list[torch.nn.Parameter], optimizer: MasterAdamW, k: int) -> None:
        for p in ps:
            p.grad = torch.full_like(p, 0.3 * k - 0.7)
        optimizer.step()

    ps, optimizer = begun()
    for k in range(6):
        if k == 3:
            saved = copy.deepcopy(optimizer.state_dict())
        step(ps, optimizer, k)
    others, another = begun()
    another.load_state_dict(saved)
    for k in range(3, 6):
        step(others, another, k)
    assert all(torch.equal(a, b) for a, b in zip(ps, others, strict=True))
