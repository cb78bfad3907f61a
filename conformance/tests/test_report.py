"""Reports: everything a run says is in them, and they are pages that stand alone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isoform.conformance import expected, plots, report
from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.numpy import NUMPY, NUMPY_TILED
from isoform.conformance.junit import junit
from isoform.conformance.metrics import ULP_EDGES
from isoform.conformance.operations import CASES
from isoform.conformance.run import Run
from isoform.conformance.run import run as judge
from isoform.conformance.summary import CAPTURED, command, idle, messages, summaries
from isoform.conformance.verdicts import Outcome, Part, Verdict
from isoform.reference.contract import Capabilities, evoformer_call

PATTERNS = ("length-17", "values/fp32/one-hot", "values/fp16/masked-rows", "empty/fp32/no-keys")
CHOSEN = [
    case
    for case in CASES.values()
    if any(pattern in case.id for pattern in PATTERNS) or case.id.endswith("-1024/fp32/ragged-mask")
]
NAME = 'zeros <b>&"'
CAPABILITIES = Capabilities(
    "evoformer_attention", head_dims=(8, 64), gradients=frozenset({"q"}), min_length=1
)


def zeros(q: Any, k: Any, v: Any, *, return_lse: bool = False, **operands: Any) -> Any:
    CAPABILITIES.require(evoformer_call(q, k, v, **operands, lse=return_lse), NAME)
    out = np.zeros_like(q)
    B, S, Q, H, _ = q.shape
    return (out, np.full((B, S, H, Q), np.nan, np.float32)) if return_lse else out


class _Gradients:
    def __init__(self, q: Any) -> None:
        self.dq = np.zeros_like(q)


ZEROS = Implementation(
    NAME, "numpy", CAPABILITIES, zeros, lambda dout, q, k, v, **operands: _Gradients(q)
)


@pytest.fixture(scope="module")
def record() -> Run:
    """A run with everything in it: passes, faults, what is unsupported and what is not run."""
    found = judge([NUMPY, NUMPY_TILED, ZEROS], CHOSEN, memory=())
    return replace(found, sources={NAME: "mine:ZEROS"})


@pytest.fixture(scope="module")
def page(record: Run) -> str:
    return report.html(record)


class Page(HTMLParser):
    """What a page consists of: elements with their attributes, the open ones, and its words."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# The page.


def test_the_page_is_well_formed(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert page.lstrip().startswith("<!doctype html>")


def test_the_page_loads_nothing(page: str) -> None:
    for tag, attributes in Page(page).elements:
        assert tag not in ("script", "iframe", "object", "embed", "img")
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:,")), (tag, value)
    assert not re.search(r"@import|https?://|//cdn", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique_and_references_lead_somewhere(page: str) -> None:
    parsed = Page(page)
    ids = [attributes["id"] for _, attributes in parsed.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = {
        str(attributes["href"])[1:]
        for _, attributes in parsed.elements
        if str(attributes.get("href", "")).startswith("#")
    }
    targets |= set(re.findall(r"url\(#([^)]*)\)", page))
    assert targets <= set(ids)


def test_the_page_is_small(page: str) -> None:
    assert len(page.encode()) < 2_000_000


def test_the_page_can_be_read_aloud(page: str) -> None:
    parsed = Page(page)
    assert parsed.all("html")[0]["lang"] == "en"
    assert len(parsed.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for attributes in parsed.all("figure"):
        assert attributes["role"] == "img"
        assert attributes["aria-label"]
    assert all(attributes["aria-hidden"] == "true" for attributes in parsed.all("svg"))
    assert len(parsed.all("caption")) == len(parsed.all("table")) > 3
    assert all(attributes.get("scope") for attributes in parsed.all("th"))


def test_the_page_follows_the_scheme_of_the_reader(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert not re.search(r"#0[0-9a-f]{5}", svg), "a colour that the page does not know"
        assert "var(--ink)" in svg or "var(--muted)" in svg


def test_names_and_messages_are_escaped(page: str) -> None:
    assert "<b>&" not in page
    assert NAME in Page(page).words


def test_the_page_says_who_passed(page: str, record: Run) -> None:
    words = " ".join(Page(page).words.split())
    assert f"2 of 3 implementations pass; {NAME} fails." in words
    for value in record.environment.values():
        assert value in words


def test_the_page_shows_failures_with_their_command(page: str) -> None:
    words = Page(page).words
    assert "out/condition" in words
    assert "the definition says" in words
    assert "isoform check --impl mine:ZEROS --case evoformer/values/" in words


def test_the_page_shows_what_was_not_judged(page: str) -> None:
    words = " ".join(Page(page).words.split())
    assert "Unsupported" in words
    assert "lengths Q=…, K=… (at least 1)" in words
    assert "Not run" in words
    assert "too large for a CPU" in words
    assert "evoformer/triangle-1024/fp32/ragged-mask" in words


def test_every_implementation_has_its_plots(page: str, record: Run) -> None:
    parsed = Page(page)
    assert len(parsed.all("svg")) == len(parsed.all("figure")) == 2 * len(record.implementations)


def test_capabilities_are_shown(page: str) -> None:
    words = Page(page).words
    assert "8–64" in words
    assert words.count("yes") > 10 and words.count("no") > 3


def test_capabilities_are_shown_for_each_operation_that_was_judged(page: str) -> None:
    assert "Capabilities for evoformer_attention by implementation" in page
    assert "rotary_embedding" not in page  # NUMPY offers it, but it was not judged on it
    rotary = CASES["rotary/length-3/fp32/half"]
    both = report.html(judge([NUMPY, NUMPY_TILED], [CHOSEN[0], rotary], memory=()))
    assert "Capabilities for rotary_embedding by implementation" in both
    words = Page(both).words
    assert "scaling=longrope" in words
    assert "positions=[B,L]" in words


def test_known_failures_are_shown_with_their_reason(
    record: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = expected.ExpectedFailure(NAME, "*", "*", "it <always> returns zeros")
    monkeypatch.setattr(expected, "expected_failures", lambda: (known,))
    excused = replace(record, sources={})
    words = " ".join(Page(report.html(excused)).words.split())
    assert f"All 3 implementations pass; {NAME} has known failures." in words
    assert "it <always> returns zeros" in words
    assert "Known failures" in words
    (summary,) = [each for each in summaries(excused) if each.implementation == NAME]
    assert not summary.failed and summary.expected and summary.ran
    assert 'failures="0"' in junit(excused)


@pytest.mark.parametrize(
    "outcomes",
    [
        (),
        (Outcome("idle", CHOSEN[0].id, "conformance", "case", Verdict.NOT_RUN, "no time"),),
        (Outcome("crash", CHOSEN[0].id, "conformance", "case", Verdict.ERROR, "boom"),),
        (Outcome("fine", CHOSEN[0].id, "conformance", "unmodified", Verdict.PASS),),
    ],
)
def test_runs_without_figures_have_a_page_too(outcomes: tuple[Outcome, ...]) -> None:
    text = report.html(Run(outcomes))
    assert Page(text).open == []
    assert ("Nothing ran." in text) == (not Run(outcomes).ran)


def test_infinite_errors_are_drawn_and_written() -> None:
    part = Part("condition", False, math.inf, 4.0, "far")
    ran = judge([NUMPY], [CASES["evoformer/length-17/fp32/all-operands"]], memory=())
    odd = next(outcome for outcome in ran.outcomes if outcome.errors)
    odd = replace(odd, verdict=Verdict.WRONG, message="out: far", parts=(part,))
    text = report.html(replace(ran, outcomes=(odd,)))
    assert "✗ ∞" in text


def test_save_writes_the_whole_page_or_nothing(record: Run, page: str, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "report.html"
    report.save(record, target)
    assert target.read_text(encoding="utf-8") == page
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


# The record.


def test_a_run_survives_json(record: Run, page: str) -> None:
    text = record.as_json()
    again = Run.from_json(text)
    assert again.as_json() == text
    assert again.environment == record.environment
    assert again.sources == record.sources
    assert again.counts() == record.counts()
    assert report.html(again) == page


def test_nan_and_infinity_survive_strict_json(record: Run) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    part = Part("condition", False, math.inf, math.nan)
    errors = next(outcome.errors for outcome in record.outcomes if outcome.errors)
    errors = replace(errors, frobenius=math.nan, worst_value=-math.inf)
    outcome = replace(record.outcomes[0], parts=(part,), errors=errors, message="nan")
    text = replace(record, outcomes=(outcome,)).as_json()
    json.loads(text, parse_constant=refuse)
    (again,) = Run.from_json(text).outcomes
    assert again.errors is not None
    assert again.message == "nan"
    assert math.isnan(again.errors.frobenius) and again.errors.worst_value == -math.inf
    assert again.parts[0].figure == math.inf and math.isnan(again.parts[0].limit)


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 99}', "no JSON"])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"schema|Expecting"):
        Run.from_json(text)


# The summary.


def test_messages_are_split_by_check() -> None:
    parts = (Part("pattern", False), Part("condition", False), Part("bias", True))
    outcome = Outcome("a", CHOSEN[0].id, "conformance", "dq", Verdict.WRONG, parts=parts)
    both = replace(outcome, message="dq: 3 of 4; not 0: x; dq: error 9")
    assert messages(both) == (("dq/pattern", "3 of 4; not 0: x"), ("dq/condition", "error 9"))
    odd = replace(outcome, message="something else")
    assert messages(odd) == (("dq/pattern, dq/condition", "something else"),)
    crash = Outcome("a", CHOSEN[0].id, "conformance", "case", Verdict.ERROR, "OSError: no")
    assert messages(crash) == (("case", "error: OSError: no"),)


def test_reasons_are_counted_without_the_sizes_of_one_case() -> None:
    outcomes = tuple(
        Outcome("a", case_id, "gradients", "gradients", Verdict.UNSUPPORTED, message)
        for case_id, message in {
            "x/1/fp32/y": "declared unsupported: gradient of q; gradient of k",
            "x/2/fp32/y": "declared unsupported: head dim D=3 (8 to 64 only); gradient of q",
            "x/3/fp32/y": "declared unsupported: head dim D=127 (8 to 64 only)",
        }.items()
    )
    assert idle(Run(outcomes), Verdict.UNSUPPORTED) == {
        "gradients": {"a": ("x/1/fp32/y", "x/2/fp32/y")},
        "head dim D=… (8 to 64 only)": {"a": ("x/2/fp32/y", "x/3/fp32/y")},
    }


def test_commands() -> None:
    large = next(case.id for case in CASES.values() if case.large)
    outcome = Outcome("mine", large, "conformance", "out", Verdict.WRONG)
    assert command(Run((outcome,)), outcome) == f"isoform check mine --case {large} --large"
    on_gpu = Run((outcome,), environment={"device": "cuda"})
    assert command(on_gpu, outcome) == f"isoform check mine --case {large} --device cuda"
    captured = replace(outcome, case="captured/step/bf16/call-0003")
    run = Run((captured,), environment={CAPTURED: "my step.safetensors"})
    assert command(run, captured) == (
        "isoform replay 'my step.safetensors' --impl mine --call call-0003"
    )


# The plots.


def test_histograms_count_each_result_once(record: Run) -> None:
    measured = plots._measured(record, "numpy")
    keys = [(outcome.case, outcome.check) for outcome in measured]
    assert len(keys) == len(set(keys))
    assert all(outcome.errors and outcome.errors.count for outcome in measured)


def test_edges_have_short_names() -> None:
    names = [plots._ulps(edge) for edge in ULP_EDGES]
    assert names[:5] == ["0", "¼", "½", "1", "2"]
    assert names[-2:] == ["2²⁴", "∞"]
    assert len(set(names)) == len(names)


def test_plots_are_the_same_each_time(record: Run) -> None:
    assert plots.budget_strips(record, "numpy") == plots.budget_strips(record, "numpy")
    assert plots.ulp_histogram(record, "numpy") == plots.ulp_histogram(record, "numpy")
