"""Which cases, checks and mutants hold an implementation to each rule of the specification.

The rules stand in ``docs/spec/``, where each shows what is said of it here; the build of the
documentation, and a test, fail where a rule has no case, no check or no mutant, and where a name
here is that of nothing. A rule is *held* if an implementation that breaks it fails: the mutants are
implementations that do, each shown to fail by the check that it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain

from isoform.conformance.attention import mutants as attention
from isoform.conformance.attention import parallel_mutants as parallel
from isoform.conformance.evoformer import mutants as evoformer
from isoform.conformance.mutant import Mutant
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.rotary import mutants as rotary

BEHAVIOURS = ("case", "determinism", "independence", "unmodified", "memory/growth")
"""Checks that look at no single result: what a call is answered with, and what it leaves."""


@dataclass(frozen=True)
class Rule:
    """What holds implementations to one rule.

    Attributes:
        cases: Shell patterns of the ids of cases.
        checks: Shell patterns of checks, such as ``out/condition``; ``invalid`` for wrong calls.
        mutants: Shell patterns of the names of mutants that break it.
    """

    cases: tuple[str, ...]
    checks: tuple[str, ...]
    mutants: tuple[str, ...]


def _rule(cases: str, checks: str, mutants: str) -> Rule:
    return Rule(tuple(cases.split()), tuple(checks.split()), tuple(mutants.split()))


GRADIENTS_OF_EVOFORMER = (
    "dq/condition dk/condition dv/condition dmask_bias/condition dpair_bias/condition "
    "dgate/condition"
)
BITS = "out/twin_max out/twin_mean out/bias"

RULES: Mapping[str, Rule] = {
    "EVO-1": _rule(
        "evoformer/operands/* evoformer/heads-* evoformer/length* evoformer/head-dim-*",
        "invalid out/shape out/dtype",
        "mutant-unchecked mutant-heads-first mutant-widened mutant-heads-interleaved",
    ),
    "EVO-2": _rule(
        "evoformer/operands/* evoformer/scale/* evoformer/length-17/*",
        "out/condition",
        "mutant-scale-dropped mutant-mask-bias-ignored mutant-pair-bias-*",
    ),
    "EVO-3": _rule(
        "evoformer/operands/* evoformer/values/*/closed-gate evoformer/values/*/one-hot",
        "out/condition lse/condition",
        "mutant-zeros mutant-gate-raw mutant-lse-base-2 mutant-last-key-lost mutant-tail-lost",
    ),
    "EVO-4": _rule(
        "evoformer/values/*/garbage-in-dropped evoformer/operands/*/mask*",
        "out/pattern dk/pattern",
        "mutant-mask-ignored mutant-garbage-seen mutant-dropped-key-gradient",
    ),
    "EVO-5": _rule(
        "evoformer/values/*/all-masked evoformer/values/*/masked-rows "
        "evoformer/values/*/minus-inf-bias evoformer/empty/*/no-keys",
        "out/pattern lse/pattern dq/pattern",
        "mutant-uniform-without-keys mutant-nan-without-keys mutant-nan-gradient-without-keys",
    ),
    "EVO-6": _rule(
        "evoformer/values/*/huge-negative-bias", "lse/pattern out/condition", "mutant-bias-as-mask"
    ),
    "EVO-7": _rule(
        "evoformer/values/*/large-logits evoformer/values/*/low-logits "
        "evoformer/values/*/subnormal evoformer/double/* evoformer/length-257/*",
        f"out/condition {BITS}",
        "mutant-fp16-probabilities mutant-bf16-* mutant-overflowing mutant-truncated "
        "mutant-flushed mutant-spiked mutant-fp8-dlogits",
    ),
    "EVO-8": _rule(
        "evoformer/operands/* evoformer/heads-*",
        GRADIENTS_OF_EVOFORMER,
        "mutant-dq-unscaled mutant-delta-omitted mutant-groups-unsummed mutant-dv-ungated "
        "mutant-dpair-* mutant-dmask-* mutant-dgate-open",
    ),
    "EVO-9": _rule(
        "evoformer/values/*/nan-attended evoformer/values/*/inf-attended",
        "out/pattern lse/pattern",
        "mutant-nan-cleaned",
    ),
    "EVO-10": _rule(
        "evoformer/empty/* evoformer/layout/* evoformer/lengths-*",
        "unmodified independence",
        "mutant-scales-in-place mutant-buffer-reused mutant-query-stale",
    ),
    "EVO-11": _rule(
        "attention/ring/* attention/values/*/rising-logits attention/values/*/no-keys-for-some",
        "out/condition out/pattern out/twin_mean",
        "attention-mutant-merge-*",
    ),
    "EVO-12": _rule(
        "evoformer/operands/*",
        "case invalid",
        "mutant-refusing mutant-crashing mutant-undeclared mutant-unchecked",
    ),
    "EVO-13": _rule("evoformer/*", "determinism", "mutant-shuffled"),
    "ROT-1": _rule(
        "rotary/length-* rotary/head-dim-* rotary/positions/*",
        "invalid out/shape dx/dtype",
        "rotary-mutant-unchecked rotary-mutant-passing-missing rotary-mutant-too-wide",
    ),
    "ROT-2": _rule(
        "rotary/partial-* rotary/base/* rotary/length-* rotary/values/*/nan-passing",
        "out/condition out/pattern",
        "rotary-mutant-zeros rotary-mutant-base-ignored rotary-mutant-exponent-of-all-channels "
        "rotary-mutant-last-token-forgotten rotary-mutant-all-channels-turned "
        "rotary-mutant-passing-*ed",
    ),
    "ROT-3": _rule(
        "rotary/length-*/*/half rotary/length-*/*/interleaved",
        "out/condition",
        "rotary-mutant-half-as-interleaved rotary-mutant-interleaved-as-half",
    ),
    "ROT-4": _rule(
        "rotary/positions*/*",
        "out/condition",
        "rotary-mutant-float32-angles-* rotary-mutant-bfloat16-positions "
        "rotary-mutant-position-off-by-one rotary-mutant-restarting-* "
        "rotary-mutant-documents-joined rotary-mutant-first-example-for-all "
        "rotary-mutant-negative-clamped rotary-mutant-positions-sorted",
    ),
    "ROT-5": _rule(
        "rotary/positions/*/shuffled rotary/values/*/subnormal rotary/double/*",
        f"out/condition {BITS}",
        "rotary-mutant-bfloat16-tables rotary-mutant-narrow-products rotary-mutant-coarse "
        "rotary-mutant-spiked rotary-mutant-cut rotary-mutant-flushed",
    ),
    "ROT-6": _rule(
        "rotary/values/*/nan-turned rotary/values/*/inf-turned rotary/values/*/huge "
        "rotary/values/*/padding",
        "out/pattern",
        "rotary-mutant-nan-cleaned",
    ),
    "ROT-7": _rule(
        "rotary/empty/* rotary/layout*/*",
        "unmodified independence",
        "rotary-mutant-writing rotary-mutant-buffer-reused",
    ),
    "ROT-8": _rule("rotary/length-* rotary/scaling*/*", "dx/condition", "rotary-mutant-backward-*"),
    "ROT-9": _rule(
        "rotary/scaling*/*",
        "out/condition",
        "rotary-mutant-linear-ignored rotary-mutant-dynamic-ignored rotary-mutant-yarn-ignored "
        "rotary-mutant-longrope-*-ignored rotary-mutant-llama3-ignored "
        "rotary-mutant-*-attention-factor-dropped",
    ),
    "ROT-10": _rule(
        "rotary/positions/*", "case invalid", "rotary-mutant-refusing rotary-mutant-unchecked"
    ),
    "ROT-11": _rule("rotary/*", "determinism", "rotary-mutant-noisy"),
    "SEQ-1": _rule(
        "attention/length* attention/heads-* attention/head-dim-*",
        "invalid out/shape out/dtype",
        "attention-mutant-unchecked attention-mutant-heads-* attention-mutant-widened",
    ),
    "SEQ-2": _rule(
        "attention/mask/*/shuffled* attention/mask/*/far attention/mask/*/per-example "
        "attention/ring/*",
        "out/condition",
        "attention-mutant-positions-* attention-mutant-key-positions-ignored",
    ),
    "SEQ-3": _rule(
        "attention/mask/* attention/window/*",
        "out/condition lse/pattern",
        "attention-mutant-causal-* attention-mutant-window-* attention-mutant-segments-ignored",
    ),
    "SEQ-4": _rule(
        "attention/values/*/garbage-in-padding attention/mask/*/padded*",
        "out/pattern lse/pattern dk/pattern",
        "attention-mutant-padding-* attention-mutant-garbage-seen",
    ),
    "SEQ-5": _rule(
        "attention/values/*/no-keys-for-some attention/values/*/all-padding "
        "attention/empty/*/no-keys",
        "out/pattern dq/pattern",
        "attention-mutant-uniform-without-keys attention-mutant-nan-without-keys "
        "attention-mutant-nan-gradient-without-keys",
    ),
    "SEQ-6": _rule(
        "attention/mask/* attention/scale/*",
        "out/condition lse/condition",
        "attention-mutant-zeros attention-mutant-scale-dropped attention-mutant-lse-base-2 "
        "attention-mutant-last-key-lost attention-mutant-tail-lost",
    ),
    "SEQ-7": _rule(
        "attention/values/*/large-logits attention/values/*/subnormal attention/double/*",
        f"out/condition {BITS}",
        "attention-mutant-fp16-probabilities attention-mutant-bf16-logits "
        "attention-mutant-overflowing attention-mutant-truncated attention-mutant-flushed "
        "attention-mutant-spiked attention-mutant-fp8-dlogits",
    ),
    "SEQ-8": _rule(
        "attention/mask/* attention/heads-*",
        "dq/condition dk/condition dv/condition",
        "attention-mutant-dq-unscaled attention-mutant-delta-omitted "
        "attention-mutant-groups-unsummed",
    ),
    "SEQ-9": _rule(
        "attention/values/*/nan-attended attention/values/*/inf-attended",
        "out/pattern lse/pattern",
        "attention-mutant-nan-cleaned",
    ),
    "SEQ-10": _rule(
        "attention/empty/* attention/layout/* attention/lengths-*",
        "unmodified independence memory/growth",
        "attention-mutant-not-linear attention-mutant-scales-in-place "
        "attention-mutant-buffer-reused attention-mutant-query-stale",
    ),
    "SEQ-11": _rule(
        "attention/ring/* attention/ranks-*",
        "out/condition dv/condition",
        "attention-mutant-merge-* attention-mutant-lse-of-the-block parallel-mutant-*",
    ),
    "SEQ-12": _rule(
        "attention/mask/*",
        "case invalid",
        "attention-mutant-refusing attention-mutant-crashing attention-mutant-undeclared "
        "attention-mutant-unchecked",
    ),
    "SEQ-13": _rule("attention/*", "determinism", "attention-mutant-shuffled"),
}
"""By the number of each rule."""


@cache
def mutants() -> Mapping[str, Mutant]:
    """All mutants, those of the strategies over ranks included, by name."""
    sets = (evoformer.MUTANTS, rotary.MUTANTS, attention.MUTANTS, parallel.MUTANTS)
    return {mutant.name: mutant for mutant in chain(*sets)}


@cache
def checks() -> frozenset[str]:
    """The names of all checks that a rule may name."""
    found = {*BEHAVIOURS, "invalid"}
    for operation in OPERATIONS.values():
        signature = operation.signature
        results = {*signature.results, *(f"d{name}" for name in signature.differentiable)}
        parts = ("pattern", "condition", "twin_max", "twin_mean", "bias", "shape", "dtype")
        found |= {f"{result}/{part}" for result in results for part in parts}
    return frozenset(found)


def cases_of(rule: Rule) -> tuple[str, ...]:
    """The ids of the cases of ``rule``."""
    return tuple(one for one in CASES if any(fnmatchcase(one, pattern) for pattern in rule.cases))


def mutants_of(rule: Rule) -> tuple[Mutant, ...]:
    """The mutants that break ``rule``."""
    return tuple(
        mutant
        for name, mutant in mutants().items()
        if any(fnmatchcase(name, pattern) for pattern in rule.mutants)
    )


def numbers(text: str) -> tuple[str, ...]:
    """The rules that a page of the specification defines, in its order."""
    return tuple(re.findall(r"^## ((?:EVO|ROT|SEQ)-\d+) ", text, re.MULTILINE))


def faults(defined: Mapping[str, str], rules: Mapping[str, Rule] = RULES) -> Iterator[str]:
    """A line for each rule that nothing holds, and for each name here that is that of nothing.

    Args:
        defined: The rules of the specification, by number; what they say does not matter.
        rules: What holds them.
    """
    for number in defined:
        rule = rules.get(number)
        if rule is None:
            yield f"{number}: no case and no check is named for it"
            continue
        for what, names in vars(rule).items():
            if not names:
                yield f"{number}: it has no {what}"
        for pattern in rule.cases:
            if not any(fnmatchcase(one, pattern) for one in CASES):
                yield f"{number}: no case is called {pattern}"
        for check in rule.checks:
            if check not in checks():
                yield f"{number}: no check is called {check}"
        for pattern in rule.mutants:
            if not any(fnmatchcase(name, pattern) for name in mutants()):
                yield f"{number}: no mutant is called {pattern}"
        killers = {mutant.killed_by.partition(":")[0] for mutant in mutants_of(rule)}
        killers = {"invalid" if one.startswith("invalid") else one for one in killers}
        if killers and killers.isdisjoint(rule.checks):
            yield f"{number}: its mutants fail by {sorted(killers)}, which are not its checks"
    for number in rules:
        if number not in defined:
            yield f"{number}: the specification has no such rule"
