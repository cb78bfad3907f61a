"""The benchmark over ranks measures what it says: kinds of events, gains, a plot."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import pytest

from isoform.parallel.benchmark import __main__ as command
from isoform.parallel.benchmark.run import KINDS, STRATEGIES, Call, Event, Speed, shares, timeline
from isoform.parallel.launch import launch


@pytest.fixture(scope="module")
def ring() -> Any:
    return launch(timeline, 2, Call(L=600, H=2, strategy="ring"), transport="gloo")


def test_what_a_ring_does(ring):
    """Two blocks forward and two backward, one merge; events follow each other."""
    assert len(ring) == 2
    for whole, events in ring:
        kinds = [event.what for event in events]
        assert kinds.count("computing") == 4
        assert kinds.count("merging") == 1
        assert kinds.count("waiting") >= 3
        for earlier, later in pairwise(events):
            assert 0 <= earlier.start <= earlier.end <= later.start
        assert events[-1].end <= whole
    assert 0 < sum(shares(ring).values()) <= 1


def test_shares_and_gains():
    one = (2.0, [Event("computing", 0, 1), Event("waiting", 1, 1.5)])
    other = (2.0, [Event("computing", 0, 2)])
    assert shares([one, other]) == {"computing": 0.75, "merging": 0.0, "waiting": 0.125}
    assert Speed(3.0, {"ring": 1.5}).gain("ring") == 2


def test_the_table_and_the_plot(ring, monkeypatch, capsys, tmp_path):
    path = tmp_path / "timeline.png"
    options = ["--length", "600", "--heads", "2", "--rounds", "1", "--transport", "gloo"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *options, "--plot", str(path)])
    monkeypatch.setattr(command, "launch", lambda *_, **__: ring)
    speed = Speed(1.0, dict.fromkeys(STRATEGIES, 0.5))
    monkeypatch.setattr(command, "measure", lambda *_: speed)
    command.main()
    said = capsys.readouterr().out
    assert said.startswith("one rank: 1.00 s, L=600 H=2 D=32, gloo\n")
    for strategy in STRATEGIES:
        assert f"\n{strategy}" in said
    assert said.count("   2.00") == len(STRATEGIES)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert command.COLOURS.keys() == {*KINDS}
