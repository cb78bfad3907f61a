"""Every verdict is given where it is due, and nothing is asked that need not be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from isoform.conformance import judge as judging
from isoform.conformance.budgets import ENOUGH
from isoform.conformance.evoformer.operation import INVALID_CALLS
from isoform.conformance.evoformer.values import draw
from isoform.conformance.implementation import Implementation, adopt
from isoform.conformance.implementations.numpy import NUMPY
from isoform.conformance.implementations.torch import REFERENCE
from isoform.conformance.judge import judge, judge_invalid_calls, judge_memory
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.oracle import expected
from isoform.conformance.verdicts import GROUPS, Outcome, Verdict
from isoform.reference.contract import Arithmetic, Capabilities, Unsupported
from isoform.reference.numpy import evoformer_attention as forward
from isoform.reference.numpy import evoformer_attention_backward as backward

NAME = "evoformer_attention"
CASE = CASES["evoformer/length-17/fp32/all-operands"]
BARE = CASES["evoformer/operands/fp32/bare"]
SMALL = CASES["evoformer/length-3/fp32/all-operands"]

RESULTS = {"out", "lse"}
GRADIENTS = {"dq", "dk", "dv", "dmask_bias", "dpair_bias", "dgate"}
BEHAVIOURS = {"unmodified", "determinism", "independence"}

Function = Callable[..., Any]


def made(
    forward: Function = forward, backward: Function = backward, **declared: Any
) -> Implementation:
    """The reference, with another forward or backward or declaration."""
    capabilities = replace(Capabilities(NAME, deterministic=True), **declared)
    return Implementation("made-up", "numpy", capabilities, forward, backward)


def declining(function: Function, *unsupported: str) -> Function:
    """``function``, but declining where one of these arguments is given."""

    def declines(*given: Any, **more: Any) -> Any:
        if any(more.get(name) is not None for name in unsupported):
            raise Unsupported([f"{name} is not supported" for name in unsupported])
        return function(*given, **more)

    return declines


def zeros(q: Any, k: Any, v: Any, **more: Any) -> Any:
    out, lse = forward(q, k, v, **more | {"return_lse": True})
    return (np.zeros_like(out), lse) if more.get("return_lse") else np.zeros_like(out)


def raising(exception: BaseException) -> Function:
    def function(*given: Any, **more: Any) -> Any:
        raise exception

    return function


def verdicts(outcomes: list[Outcome]) -> dict[str, Verdict]:
    assert len({outcome.check for outcome in outcomes}) == len(outcomes)
    return {outcome.check: outcome.verdict for outcome in outcomes}


def failed(outcomes: list[Outcome]) -> set[str]:
    return {check for outcome in outcomes for check in outcome.failed_checks}


# What is declared supported


def test_what_is_right_passes_every_check() -> None:
    found = judge(made(), CASE, groups=["conformance", "gradients"])
    assert verdicts(found) == dict.fromkeys(RESULTS | GRADIENTS | BEHAVIOURS, Verdict.PASS)
    for outcome in found:
        assert (outcome.implementation, outcome.case, outcome.message) == ("made-up", CASE.id, "")
        assert outcome.failed_checks == ()
        if outcome.check in RESULTS | GRADIENTS:
            assert {part.name for part in outcome.parts} == {"pattern", "condition"}
            assert outcome.errors is not None
            assert outcome.errors.count > 0
            assert outcome.seconds > 0
    assert {outcome.group for outcome in found if outcome.check in GRADIENTS} == {"gradients"}
    assert {outcome.group for outcome in found if outcome.check not in GRADIENTS} == {"conformance"}


def test_wrong_numbers_are_wrong_and_shown() -> None:
    found = judge(made(zeros), CASE, groups=["conformance"])
    assert verdicts(found) == {
        **dict.fromkeys({"lse"} | BEHAVIOURS, Verdict.PASS),
        "out": Verdict.WRONG,
    }
    [wrong] = [outcome for outcome in found if outcome.verdict.fails]
    assert wrong.failed_checks == ("out/condition",)
    assert wrong.message.startswith("out: error ")
    assert "u·κ, allowed" in wrong.message
    assert "it is 0, the definition says" in wrong.message
    assert wrong.errors is not None
    assert wrong.errors.worst_value == 0 != wrong.errors.worst_reference


def test_a_wrong_gradient_is_wrong_and_nothing_else_is() -> None:
    def transposed(dout: Any, *given: Any, **more: Any) -> Any:
        gradients = backward(dout, *given, **more)
        return gradients._replace(dpair_bias=gradients.dpair_bias.swapaxes(-1, -2))

    found = judge(made(backward=transposed), CASE)
    assert failed(found) >= {"dpair_bias/condition"}
    assert {check.split("/")[0] for check in failed(found)} == {"dpair_bias"}


@pytest.mark.parametrize(
    ("spoil", "check", "said"),
    [
        (lambda out: out.swapaxes(2, 3), "out/shape", "out has shape (1, 2, 2, 17, 16), must have"),
        (lambda out: out[0], "out/shape", "out has shape (2, 17, 2, 16), must have (1, 2, 17"),
        (
            lambda out: out.astype(np.float64),
            "out/dtype",
            "out has dtype float64, must have float32",
        ),
        (lambda out: None, "out/shape", "out has shape (), must have (1, 2, 17, 2, 16)"),
        (lambda out: np.where(out > 1, np.nan, out), "out/pattern", "elements must not be NaN"),
    ],
)
def test_what_is_wrong_with_a_result_is_said(
    spoil: Callable[[Any], Any], check: str, said: str
) -> None:
    def spoiled(*given: Any, **more: Any) -> Any:
        out, lse = forward(*given, **more | {"return_lse": True})
        return (spoil(out), lse) if more.get("return_lse") else spoil(out)

    found = judge(made(spoiled), CASE, groups=["conformance"])
    assert failed(found) == {check}
    assert said in next(outcome.message for outcome in found if outcome.verdict.fails)


def test_declining_what_is_declared_breaks_the_declaration() -> None:
    [outcome] = judge(made(declining(forward, "gate")), CASE)
    assert outcome.check == "case"
    assert outcome.verdict is Verdict.BROKEN_DECLARATION
    assert "gate is not supported" in outcome.message


@pytest.mark.parametrize(
    ("exception", "said"),
    [
        (RuntimeError("out of registers\nat line 3"), "RuntimeError: out of registers"),
        (AssertionError(), "AssertionError: "),
        (NotImplementedError("gate"), "NotImplementedError: gate"),
    ],
)
def test_raising_anything_else_is_an_error(exception: Exception, said: str) -> None:
    [outcome] = judge(made(raising(exception)), CASE, groups=["conformance"])
    assert (outcome.check, outcome.verdict, outcome.message) == ("case", Verdict.ERROR, said)
    assert outcome.failed_checks == ("case",)


def test_a_user_who_interrupts_is_obeyed() -> None:
    with pytest.raises(KeyboardInterrupt):
        judge(made(raising(KeyboardInterrupt())), CASE)


@pytest.mark.parametrize("returned", ["wrong", (1, np.ones(2)), (np.ones(2), np.ones(3))])
def test_what_is_no_result_at_all_is_at_fault_and_does_not_stop_the_judge(returned: Any) -> None:
    for lse in (True, False):
        found = judge(made(lambda *given, **more: returned, lse=lse), BARE, groups=["conformance"])
        assert failed(found)


def test_what_pytorch_code_returns_must_be_tensors() -> None:
    implementation = replace(REFERENCE, name="made-up", forward=lambda *given, **more: (None, None))
    [outcome] = judge(implementation, CASE, groups=["conformance"])
    assert outcome.verdict is Verdict.ERROR
    assert outcome.message == "TypeError: out must be a tensor, got NoneType"


# What is declared unsupported


WITHOUT_GATE = {"operands": frozenset({"mask", "mask_bias", "pair_bias"})}


@pytest.mark.parametrize("groups", [["conformance"], ["gradients"], ["precision"], GROUPS])
def test_declining_what_is_not_declared_is_right(groups: list[str]) -> None:
    [outcome] = judge(made(declining(forward, "gate"), **WITHOUT_GATE), CASE, groups=groups)
    assert (outcome.check, outcome.verdict) == ("case", Verdict.UNSUPPORTED)
    assert outcome.group == groups[0]
    assert outcome.message == "declared unsupported: operand gate"
    assert not outcome.verdict.fails


def test_returning_what_is_not_declared_is_undeclared_and_judged() -> None:
    found = verdicts(judge(made(**WITHOUT_GATE), CASE, groups=["conformance", "gradients"]))
    assert found.pop("case") is Verdict.UNDECLARED
    assert found.keys() <= {"out"} | GRADIENTS
    assert found["out"] is Verdict.PASS
    assert set(found.values()) == {Verdict.PASS}

    found = verdicts(judge(made(zeros, **WITHOUT_GATE), CASE, groups=["conformance"]))
    assert found == {"case": Verdict.UNDECLARED, "out": Verdict.WRONG}


def test_crashing_on_what_is_not_declared_is_a_bad_refusal() -> None:
    [outcome] = judge(made(raising(IndexError("tile")), **WITHOUT_GATE), CASE)
    assert (outcome.check, outcome.verdict) == ("case", Verdict.BAD_REFUSAL)
    assert outcome.message == "declared unsupported: operand gate, but raised IndexError: tile"


@pytest.mark.parametrize(
    ("function", "expected_verdicts"),
    [
        (declining(forward, "return_lse"), {"lse": Verdict.UNSUPPORTED}),
        (raising(TypeError("return_lse")), None),
        (forward, {"lse": Verdict.UNDECLARED}),
    ],
)
def test_lse_that_is_not_declared(
    function: Function, expected_verdicts: dict[str, Verdict] | None
) -> None:
    if expected_verdicts is None:
        [outcome] = judge(made(function, lse=False), CASE, groups=["conformance"])
        assert outcome.verdict is Verdict.ERROR
        return
    found = judge(made(function, lse=False), CASE, groups=["conformance"])
    about_lse = [outcome for outcome in found if outcome.check == "lse"]
    assert about_lse[0].verdict is expected_verdicts["lse"]
    returned = expected_verdicts["lse"] is Verdict.UNDECLARED
    assert [outcome.verdict for outcome in about_lse[1:]] == [Verdict.PASS] * returned
    others = {outcome.check for outcome in found} - {"lse"}
    assert others == {"out"} | BEHAVIOURS


def test_lse_that_is_not_declared_and_wrong_or_crashing() -> None:
    def in_base_2(*given: Any, **more: Any) -> Any:
        returned = forward(*given, **more)
        return (
            (returned[0], returned[1] / np.float32(np.log(2)))
            if more.get("return_lse")
            else returned
        )

    found = judge(made(in_base_2, lse=False), CASE, groups=["conformance"])
    assert failed(found) == {"lse/condition"}

    def without(q: Any, k: Any, v: Any, *, return_lse: Any = None, **more: Any) -> Any:
        if return_lse is not None:
            raise TypeError("unexpected argument return_lse")
        return forward(q, k, v, **more)

    found = judge(made(without, lse=False), CASE, groups=["conformance"])
    assert [o.verdict for o in found if o.check == "lse"] == [Verdict.BAD_REFUSAL]


def test_gradients_that_are_not_declared() -> None:
    some = {"gradients": frozenset({"q", "k", "v"})}

    def declines(*given: Any, **more: Any) -> Any:
        raise Unsupported(["gradients"])

    none = made(backward=declines, gradients=frozenset())
    assert verdicts(judge(none, CASE, groups=["gradients"])) == {"gradients": Verdict.UNSUPPORTED}
    assert verdicts(judge(none, CASE, groups=["conformance", "gradients"])) == {
        "gradients": Verdict.UNSUPPORTED,
        **dict.fromkeys(RESULTS | BEHAVIOURS, Verdict.PASS),
    }

    found = judge(made(**some), CASE, groups=["gradients"])
    assert verdicts(found) == {
        "gradients": Verdict.UNDECLARED,
        **dict.fromkeys(GRADIENTS | BEHAVIOURS, Verdict.PASS),
    }

    def wrong(dout: Any, *given: Any, **more: Any) -> Any:
        gradients = backward(dout, *given, **more)
        return gradients._replace(dgate=gradients.dgate * 2)

    assert failed(judge(made(backward=wrong, **some), CASE, groups=["gradients"])) == {
        "dgate/condition"
    }
    found = judge(
        made(backward=raising(KeyError("dgate")), gradients=frozenset()), CASE, groups=["gradients"]
    )
    assert verdicts(found)["gradients"] is Verdict.BAD_REFUSAL


def test_a_bare_numpy_function_need_not_have_gradients() -> None:
    found = judge(adopt(forward, framework="numpy", name="bare"), CASE, groups=["gradients"])
    assert verdicts(found)["gradients"] is Verdict.UNSUPPORTED
    assert not failed(found)


# Faults of the backward alone


@pytest.mark.parametrize(
    ("groups", "group"), [(GROUPS, "gradients"), (["conformance", "precision"], "precision")]
)
def test_a_backward_that_crashes_does_not_hide_the_forward(groups: list[str], group: str) -> None:
    broken = made(zeros, raising(RuntimeError("no grad_fn")))
    found = judge(broken, CASE, groups=groups)
    [error] = [outcome for outcome in found if outcome.verdict is Verdict.ERROR]
    assert (error.group, error.check) == (group, "gradients")
    assert error.message == "RuntimeError: no grad_fn"
    assert "out/condition" in failed(found)
    assert not failed(found) & {"case", "lse/condition"}

    [refused] = [
        outcome
        for outcome in judge(made(backward=raising(Unsupported(["training"]))), CASE, groups=groups)
        if outcome.verdict.fails
    ]
    assert (refused.check, refused.verdict) == ("gradients", Verdict.BROKEN_DECLARATION)


def test_pytorch_code_that_returns_zeros_is_told_so() -> None:
    """Though autograd knows of no way from them to the operands."""

    def torch_zeros(q: Any, k: Any, v: Any, mask: Any = None, gate: Any = None) -> Any:
        return torch.zeros_like(q)

    found = judge(adopt(torch_zeros), CASES["evoformer/operands/fp32/mask+gate"])
    assert failed(found) >= {"out/condition", "gradients"}
    assert "case" not in failed(found)


# What is asked


class Counting:
    """The reference, counting the calls."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def implementation(self, **declared: Any) -> Implementation:
        def counted_forward(*given: Any, **more: Any) -> Any:
            self.calls["lse" if more.get("return_lse") else "forward"] += 1
            return forward(*given, **more)

        def counted_backward(*given: Any, **more: Any) -> Any:
            self.calls["backward"] += 1
            return backward(*given, **more)

        return made(counted_forward, counted_backward, **declared)


def test_conformance_asks_for_no_gradient() -> None:
    counting = Counting()
    found = judge(counting.implementation(), CASE, groups=["conformance"])
    assert {outcome.group for outcome in found} == {"conformance"}
    assert {outcome.check for outcome in found} == RESULTS | BEHAVIOURS
    assert counting.calls == {"lse": 3}  # once, once with other operands, once again


def test_gradients_are_asked_for_where_they_are_defined() -> None:
    counting = Counting()
    found = judge(counting.implementation(), CASE, groups=["gradients"])
    assert {outcome.check for outcome in found} == GRADIENTS | BEHAVIOURS
    assert {outcome.group for outcome in found} == {"gradients"}
    assert counting.calls["backward"] == 3

    counting = Counting()
    not_finite = CASES["evoformer/values/fp32/nan-attended"]
    found = judge(counting.implementation(), not_finite, groups=["gradients"])
    assert verdicts(found) == dict.fromkeys(BEHAVIOURS, Verdict.PASS)
    assert counting.calls["backward"] == 0


def test_gradients_are_those_of_the_operands_that_are_there() -> None:
    found = judge(made(), CASES["evoformer/operands/fp32/mask+gate"], groups=["gradients"])
    assert {outcome.check for outcome in found} == {"dq", "dk", "dv", "dgate"} | BEHAVIOURS


def test_precision_asks_once_and_looks_at_everything() -> None:
    counting = Counting()
    found = judge(counting.implementation(), BARE, groups=["precision"])
    assert {outcome.check for outcome in found} == {"out", "lse", "dq", "dk", "dv"}
    assert counting.calls == {"lse": 1, "backward": 1}
    for outcome in found:
        assert outcome.verdict is Verdict.PASS
        assert {part.name for part in outcome.parts} == {"twin_max", "twin_mean", "bias"}


def test_few_elements_tell_nothing_of_precision() -> None:
    found = {outcome.check: outcome for outcome in judge(made(), SMALL, groups=["precision"])}
    assert found["lse"].errors is not None
    assert found["lse"].errors.count < ENOUGH
    assert found["lse"].parts == ()


def test_groups_together_ask_no_more_than_one() -> None:
    counting = Counting()
    found = judge(counting.implementation(), CASE, groups=["precision", "gradients", "conformance"])
    assert counting.calls == {"lse": 3, "backward": 3}
    assert [outcome.group for outcome in found if outcome.check == "out"] == [
        "conformance",
        "precision",
    ]
    assert {outcome.group for outcome in found if outcome.check in BEHAVIOURS} == {"conformance"}


@pytest.mark.parametrize("groups", [[], ["accuracy"]])
def test_groups_must_be_known(groups: list[str]) -> None:
    with pytest.raises(ValueError, match="groups must be some of conformance, gradients, precis"):
        judge(made(), CASE, groups=groups)


def test_what_cannot_be_run_here_is_not_run() -> None:
    never = made(raising(AssertionError("asked")))
    [outcome] = judge(never, CASE, device="cuda", groups=["gradients"])
    assert (outcome.verdict, outcome.group) == (Verdict.NOT_RUN, "gradients")
    assert outcome.message == "no device cuda here"

    large = replace(CASES["evoformer/extra-msa-5120/fp32/ragged-mask"])
    [outcome] = judge(never, large)
    assert outcome.verdict is Verdict.NOT_RUN
    assert outcome.message == "too large for a CPU; --large runs it"
    assert not outcome.verdict.fails


def test_what_is_too_large_is_run_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isoform.conformance.case.CPU_SIZE", 10)
    assert CASE.large
    [outcome] = judge(made(), CASE, groups=["conformance"])
    assert outcome.verdict is Verdict.NOT_RUN
    assert verdicts(judge(made(), CASE, groups=["conformance"], large=True))["out"] is Verdict.PASS


# How a call behaves


def scaling_in_place(q: Any, k: Any, v: Any, *, scale: Any = None, **more: Any) -> Any:
    q *= q.dtype.type(q.shape[-1] ** -0.5 if scale is None else scale)
    return forward(q, k, v, scale=1.0, **more)


def test_operands_must_be_left_alone() -> None:
    found = judge(made(scaling_in_place), CASE, groups=["conformance"])
    assert "unmodified" in failed(found)
    [outcome] = [outcome for outcome in found if outcome.check == "unmodified"]
    assert outcome.message == "the call changed q"
    assert verdicts(found)["out"] is Verdict.PASS


def test_an_implementation_that_writes_to_its_operands_spoils_nothing_for_the_next() -> None:
    def destroying(q: Any, k: Any, v: Any, **more: Any) -> Any:
        returned = forward(q, k, v, **more)
        for x in (q, k, v, *(x for x in more.values() if isinstance(x, np.ndarray))):
            x[...] = 0
        return returned

    first = judge(made(destroying), CASE)
    assert "unmodified" in failed(first)
    kept = expected(CASE, True).operands
    for name, x in draw(CASE).items():
        np.testing.assert_array_equal(kept[name], x)
    assert not failed(judge(made(), CASE))


def test_results_must_not_change_when_others_are_computed() -> None:
    buffers: dict[tuple[int, ...], Any] = {}

    def reusing(*given: Any, **more: Any) -> Any:
        out, lse = forward(*given, **more)
        buffer = buffers.setdefault(out.shape, np.empty_like(out))
        buffer[...] = out
        return buffer, lse

    found = judge(made(reusing), CASE, groups=["conformance"])
    assert "independence" in failed(found)
    [outcome] = [outcome for outcome in found if outcome.check == "independence"]
    assert outcome.message == "a later call changed out, returned by an earlier one"


def test_results_must_not_depend_on_earlier_calls() -> None:
    earlier: list[Any] = []

    def stale(*given: Any, **more: Any) -> Any:
        out, lse = forward(*given, **more)
        earlier.append(out)
        return (earlier[-2] if len(earlier) > 1 else out), lse

    found = judge(made(stale, deterministic=False), CASE, groups=["conformance"])
    assert failed(found) == {"independence"}
    [outcome] = [outcome for outcome in found if outcome.check == "independence"]
    assert outcome.message == "out are wrong after a call with other operands"


def test_a_call_that_fails_the_second_time_is_not_independent() -> None:
    calls = []

    def once(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("already launched")
        return forward(*given, **more)

    found = verdicts(judge(made(once), CASE, groups=["conformance"]))
    assert found["independence"] is Verdict.ERROR
    assert found["out"] is Verdict.PASS


def test_a_result_of_another_shape_the_second_time_is_no_accident_of_the_judge() -> None:
    calls = []

    def growing(*given: Any, **more: Any) -> Any:
        calls.append(1)
        out, lse = forward(*given, **more)
        return (out[:, :1] if len(calls) > 2 else out), lse

    assert failed(judge(made(growing), CASE, groups=["conformance"])) == {
        "determinism",
        "independence",
    }


def last_digit_changes() -> Function:
    calls = []

    def function(*given: Any, **more: Any) -> Any:
        calls.append(1)
        out, lse = forward(*given, **more)
        flat = out.reshape(-1)
        if len(calls) > 2:  # the second is made with other operands
            flat[0] = np.nextafter(flat[0], np.float32(np.inf))
        return out, lse

    return function


def test_what_is_declared_deterministic_must_repeat_itself_bitwise() -> None:
    found = judge(made(last_digit_changes()), CASE, groups=["conformance"])
    assert failed(found) == {"determinism"}
    [outcome] = [outcome for outcome in found if outcome.check == "determinism"]
    assert outcome.message == "out differ from one run to the next"


def test_what_is_not_declared_deterministic_need_only_be_right() -> None:
    found = judge(made(last_digit_changes(), deterministic=False), CASE, groups=["conformance"])
    assert verdicts(found) == dict.fromkeys(RESULTS | {"unmodified", "independence"}, Verdict.PASS)


def test_nan_repeats_itself() -> None:
    case = CASES["evoformer/values/fp32/nan-attended"]
    assert not failed(judge(made(), case, groups=["conformance"]))


# Wrong calls


def test_wrong_calls_are_answered_rightly_by_the_reference() -> None:
    found = judge_invalid_calls(replace(NUMPY, others=()))
    assert {outcome.verdict for outcome in found} == {Verdict.PASS}
    assert {outcome.check for outcome in found} == {
        "invalid/unmodified",
        *(f"invalid/{invalid.name}" for invalid in INVALID_CALLS),
    }
    assert {outcome.group for outcome in found} == {"conformance"}
    assert {outcome.verdict for outcome in judge_invalid_calls(REFERENCE)} == {Verdict.PASS}


def test_only_wrong_calls_with_what_is_offered_are_made() -> None:
    found = judge_invalid_calls(
        replace(
            NUMPY,
            capabilities=Capabilities(NAME, operands=frozenset({"gate"}), grouped_heads=False),
            others=(),
        )
    )
    about = {outcome.check.removeprefix("invalid/").split(":")[0] for outcome in found}
    assert about == {"q", "k", "v", "gate", "scale", "unmodified"}
    assert not failed(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_wrong_calls_are_made_in_a_dtype_that_is_offered(dtype: str) -> None:
    seen = set()

    def watching(q: Any, *given: Any, **more: Any) -> Any:
        seen.add(str(getattr(q, "dtype", None)))
        return forward(q, *given, **more)

    assert not failed(judge_invalid_calls(made(watching, dtypes=frozenset({dtype}))))
    assert seen == {dtype, "bool"}  # bool is one of the wrong calls


def answering(answer: Function) -> Implementation:
    """Calls ``answer`` where the reference raises."""

    def function(*given: Any, **more: Any) -> Any:
        try:
            return forward(*given, **more)
        except Exception as exception:
            return answer(exception)

    return made(function)


def rethrow(kind: type[Exception], message: str | None = None) -> Function:
    def answer(exception: Exception) -> Any:
        raise kind(str(exception) if message is None else message)

    return answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda exception: np.zeros(3), "must raise ValueError, returned"),
        (rethrow(KeyError, "k"), "must raise ValueError, raised KeyError: 'k'"),
        (rethrow(Unsupported, "k"), "must raise ValueError, raised Unsupported"),
        (rethrow(ValueError, "bad shape"), "the message does not name k: ValueError: bad shape"),
        (rethrow(TypeError), "must raise ValueError, raised TypeError: k must have 5 axes"),
    ],
)
def test_another_answer_to_a_wrong_call_is_wrong(answer: Function, said: str) -> None:
    found = {outcome.check: outcome for outcome in judge_invalid_calls(answering(answer))}
    outcome = found["invalid/k: an axis too many"]
    assert outcome.verdict is Verdict.WRONG
    assert outcome.message.startswith(said)
    assert outcome.failed_checks == ("invalid/k: an axis too many",)
    assert found["invalid/unmodified"].verdict is Verdict.PASS


def test_wrong_calls_must_leave_operands_alone_too() -> None:
    def careless(q: Any, k: Any, v: Any, **more: Any) -> Any:
        if isinstance(v, np.ndarray):
            v *= 2
        return forward(q, k, v, **more)

    assert failed(judge_invalid_calls(made(careless))) == {"invalid/unmodified"}


def test_wrong_calls_and_memory_need_the_device() -> None:
    [outcome] = judge_invalid_calls(made(raising(AssertionError("asked"))), "cuda")
    assert (outcome.check, outcome.verdict) == ("invalid", Verdict.NOT_RUN)
    [outcome] = judge_memory(made(raising(AssertionError("asked"))), "cuda")
    assert (outcome.check, outcome.verdict) == ("memory", Verdict.NOT_RUN)
    assert outcome.message == "no device cuda here"


# Memory


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "MEMORY_LENGTHS", (128, 256, 512))


def allocating(count: Callable[[int], int]) -> tuple[Function, Function]:
    """A forward and a backward that hold ``count(L)`` bytes for a while."""

    def hold(q: Any, *given: Any, **more: Any) -> Any:
        np.ones(count(q.shape[2]), np.uint8)
        return (q, q) if more.get("return_lse") else q

    def hold_too(dout: Any, q: Any, k: Any, v: Any, **more: Any) -> Any:
        hold(q)
        return dout, k, v, more.get("mask_bias"), more.get("pair_bias"), more.get("gate")

    return hold, hold_too


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("memory", "power", "verdict"),
    [
        ("linear", 1, Verdict.PASS),
        ("linear", 2, Verdict.WRONG),
        ("quadratic", 1, Verdict.PASS),
        ("quadratic", 2, Verdict.PASS),
        ("quadratic", 3, Verdict.WRONG),
    ],
)
def test_memory_grows_as_declared(memory: Any, power: int, verdict: Verdict) -> None:
    size = {1: lambda L: 40_000 * L, 2: lambda L: 200 * L**2, 3: lambda L: L**3 // 2}[power]
    [outcome] = judge_memory(made(*allocating(size), memory=memory))
    assert (outcome.check, outcome.group, outcome.verdict) == ("memory", "conformance", verdict)
    [part] = outcome.parts
    assert part.name == "growth"
    assert part.figure == pytest.approx(power, abs=0.1)
    if verdict.fails:
        assert outcome.failed_checks == ("memory/growth",)
        assert outcome.message.startswith(f"declared {memory}, but grows as L^{power}")
        assert "MiB at L=512" in outcome.message


@pytest.mark.usefixtures("short")
def test_memory_is_asked_with_what_is_offered_alone() -> None:
    seen = []

    def watching(q: Any, k: Any, v: Any, **more: Any) -> Any:
        seen.append((q.shape[2], set(more)))
        return np.ones_like(q)

    narrow = {"operands": frozenset({"mask", "pair_bias"}), "gradients": frozenset(), "lse": False}
    judge_memory(made(watching, raising(AssertionError("backward")), **narrow))
    assert seen == [(length, {"mask"}) for length in (128, 256, 512)]


@pytest.mark.usefixtures("short")
def test_memory_of_what_is_not_supported_fails_or_is_not_seen() -> None:
    [outcome] = judge_memory(made(raising(AssertionError("asked")), dtypes=frozenset({"bfloat16"})))
    assert outcome.verdict is Verdict.NOT_RUN
    assert "dtype float32" in outcome.message

    [outcome] = judge_memory(made(raising(MemoryError("all of it"))))
    assert (outcome.verdict, outcome.message) == (Verdict.ERROR, "MemoryError: all of it")
    assert outcome.failed_checks == ("memory",)

    forward_only = Capabilities(NAME, gradients=frozenset())
    nothing = Implementation("nothing", "torch", forward_only, lambda q, k, v, **more: (q, q))
    [outcome] = judge_memory(nothing)
    assert outcome.verdict is Verdict.NOT_RUN
    assert outcome.message == "what it allocates is not seen by torch"


# Several operations under one name


def test_only_what_is_offered_can_be_judged() -> None:
    alone = replace(NUMPY, others=())
    with pytest.raises(ValueError, match="numpy does not offer rotary_embedding"):
        judge(alone, CASES["rotary/length-3/fp32/half"])
    assert not failed(judge(NUMPY, CASES["rotary/length-3/fp32/half"]))


def test_every_operation_has_its_own_wrong_calls_and_memory() -> None:
    found = {outcome.case.split("/")[0] for outcome in judge_invalid_calls(NUMPY)}
    assert found == {OPERATIONS[one.operation].short for one in NUMPY.offers}
    rotary = NUMPY.of("rotary_embedding")
    assert rotary is not None
    (outcome,) = judge_memory(rotary)
    assert outcome.verdict is Verdict.PASS
    assert outcome.parts[0].limit < 1.5  # declared linear


def test_lse_is_asked_of_operations_that_have_it() -> None:
    outcomes = judge(NUMPY, CASES["rotary/length-3/fp32/half"])
    assert {outcome.check for outcome in outcomes} == {
        *("out", "dx", "unmodified", "determinism", "independence")
    }


# --- where the definition is zero because all cancels ---

ONE_KEY = CASES["evoformer/lengths-64-1/bf16/bare"]


def softmax_of_one_key(rounding: float) -> Implementation:
    """Of one key, p is 1 and p·(dP − δ) is 0: here it is off by ``rounding`` of dP, either way."""

    def cancels(dout: Any, q: Any, k: Any, v: Any, **more: Any) -> Any:
        right = backward(dout, q, k, v, **more)
        wide = [x.astype(np.float64) for x in (dout, v, k)]
        dp = (wide[0] * wide[1]).sum(-1, keepdims=True)  # [B, S, Q, H, 1], to the only key
        sign = np.where(np.arange(dp.shape[2]) % 2, 1.0, -1.0)[:, None, None]
        dq = q.shape[-1] ** -0.5 * rounding * sign * dp * wide[2]
        return right._replace(dq=dq.astype(q.dtype))

    arithmetic = Arithmetic(probabilities="operand", output="operand", dlogits="operand")
    return made(backward=cancels, arithmetic=arithmetic, dtypes=frozenset({"bfloat16"}))


def of_dq(implementation: Implementation) -> Outcome:
    """What is said of dq's statistics."""
    said = judge(implementation, ONE_KEY, groups=["precision"])
    return next(outcome for outcome in said if outcome.check == "dq")


def test_what_cancels_may_be_off_by_a_rounding_of_what_cancels(monkeypatch) -> None:
    assert not expected(ONE_KEY, True).results["dq"].any()
    assert of_dq(softmax_of_one_key(2.0**-24)).verdict is Verdict.PASS
    monkeypatch.setattr(judging, "_beside_noise", lambda found, *more: found)
    alone = of_dq(softmax_of_one_key(2.0**-24))
    assert alone.verdict is Verdict.WRONG
    assert "times the twin's" in alone.message


@pytest.mark.parametrize(
    ("rounding", "fault"),
    [(1.0, "δ forgotten"), (2.0**-9, "δ in bfloat16"), (2.0**-21, "eight roundings")],
)
def test_what_cancels_is_wrong_where_it_is_off_by_more(rounding: float, fault: str) -> None:
    assert of_dq(softmax_of_one_key(rounding)).verdict is Verdict.WRONG, fault
