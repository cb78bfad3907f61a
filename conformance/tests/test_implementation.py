"""Whatever offers the operation is taken; whatever does not is told what it lacks."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isoform.conformance.implementation import Implementation, adopt
from isoform.conformance.implementations.numpy import NUMPY
from isoform.reference.contract import DIFFERENTIABLE, OPTIONAL_OPERANDS, Capabilities, Unsupported
from isoform.reference.numpy import (
    evoformer_attention,
    evoformer_attention_backward,
    rotary_embedding,
    rotary_embedding_backward,
)
from isoform.reference.rotary_contract import BASIC

NAME = "evoformer_attention"
CAPABILITIES = Capabilities(NAME, dtypes=frozenset({"float32"}))


class Kernel:
    """As the module's docstring shows it."""

    name = "mine"
    framework = "numpy"
    capabilities = CAPABILITIES
    evoformer_attention = staticmethod(evoformer_attention)
    evoformer_attention_backward = staticmethod(evoformer_attention_backward)


def operands(**more: Any) -> dict[str, Any]:
    q = np.ones((1, 2, 3, 1, 4), np.float32)
    return {"q": q, "k": q, "v": q, **more}


# Objects


def test_an_implementation_is_taken_as_it_is() -> None:
    assert adopt(NUMPY) is NUMPY
    assert adopt(NUMPY, framework="torch").framework == "numpy"
    assert adopt(NUMPY, name="other") == replace(NUMPY, name="other")


@pytest.mark.parametrize("candidate", [Kernel, Kernel()])
def test_a_class_and_an_object_of_it(candidate: object) -> None:
    found = adopt(candidate)
    assert (found.name, found.framework, found.operation) == ("mine", "numpy", NAME)
    assert found.capabilities is CAPABILITIES
    np.testing.assert_array_equal(found.forward(**operands()), evoformer_attention(**operands()))
    assert found.backward is evoformer_attention_backward
    assert adopt(candidate, name="other").name == "other"


def test_a_module_and_things_without_a_name() -> None:
    module = ModuleType("fast_kernels")
    vars(module).update(capabilities=CAPABILITIES, evoformer_attention=lambda q, k, v: q)
    assert adopt(module).name == "fast_kernels"
    assert adopt(SimpleNamespace(**vars(module) | {"__name__": None})).name == "SimpleNamespace"

    class Nameless(Kernel):
        name = ""

    assert adopt(Nameless).name == "Nameless"
    assert adopt(Nameless()).name == "Nameless"


def test_with_pytorch_a_backward_is_not_needed() -> None:
    found = adopt(SimpleNamespace(capabilities=CAPABILITIES, evoformer_attention=lambda q, k, v: q))
    assert found.framework == "torch"
    assert found.backward is None


class Lacking(Kernel):
    evoformer_attention = None  # type: ignore[assignment]


class WithoutBackward(Kernel):
    evoformer_attention_backward = None  # type: ignore[assignment]


class OfAnotherLibrary(Kernel):
    framework = "jax"


class Vague(Kernel):
    capabilities = "float32 only"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        (Lacking(), "declares evoformer_attention but has no such function"),
        (WithoutBackward(), "declares gradients but has no evoformer_attention_backward"),
        (OfAnotherLibrary(), "framework must be one of numpy, torch, got 'jax'"),
        (Vague(), "capabilities must be Capabilities, got str"),
        (SimpleNamespace(name="x"), "must be a function with the signature of evoformer_attention"),
        (3, "must be a function with the signature of evoformer_attention, or have 'capabilities'"),
    ],
)
def test_what_is_missing_is_named(candidate: object, said: str) -> None:
    with pytest.raises(TypeError) as raised:
        adopt(candidate)
    assert said in str(raised.value)


def test_a_forward_alone_will_do_where_no_gradient_is_declared() -> None:
    class ForwardOnly(WithoutBackward):
        capabilities = replace(CAPABILITIES, gradients=frozenset())

    assert adopt(ForwardOnly).backward is None


def test_a_function_that_does_not_tell_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    def signature(function: object) -> inspect.Signature:
        raise ValueError("no signature found")  # as of some that are written in C

    monkeypatch.setattr(inspect, "signature", signature)
    with pytest.raises(TypeError, match="does not tell its signature"):
        adopt(lambda q, k, v: q)


def test_an_unknown_framework_is_refused_for_functions_too() -> None:
    with pytest.raises(TypeError, match="framework must be one of numpy, torch, got 'cupy'"):
        adopt(lambda q, k, v: q, framework="cupy")


# Bare functions


def test_a_function_offers_what_its_signature_names() -> None:
    def narrow(q: Any, k: Any, v: Any, mask: Any = None, *, gate: Any = None) -> Any:
        return q

    found = adopt(narrow, framework="numpy")
    assert (found.name, found.framework) == ("narrow", "numpy")
    assert found.capabilities == Capabilities(
        NAME, operands=frozenset({"mask", "gate"}), gradients=frozenset(), lse=False
    )


def test_a_function_that_takes_anything_offers_everything() -> None:
    found = adopt(lambda q, k, v, **more: q, name="anything")
    assert found.name == "anything"
    assert found.framework == "torch"
    assert found.capabilities == Capabilities(NAME)
    assert found.capabilities.operands == set(OPTIONAL_OPERANDS)
    assert found.capabilities.gradients == set(DIFFERENTIABLE)
    assert found.capabilities.lse


def test_lse_is_offered_where_it_is_named() -> None:
    def function(q: Any, k: Any, v: Any, return_lse: bool = False) -> Any:
        return (q, q) if return_lse else q

    assert adopt(function).capabilities.lse
    assert adopt(function).capabilities.gradients == {"q", "k", "v"}
    assert len(adopt(function, framework="numpy").forward(**operands(), return_lse=True)) == 2


def test_a_function_declines_for_itself_with_every_reason() -> None:
    found = adopt(lambda q, k, v, scale=None: q * 2, framework="numpy", name="bare")
    assert (found.forward(**operands(), scale=0.5) == 2).all()
    gate = np.ones((1, 2, 3, 1, 4), np.float32)
    with pytest.raises(Unsupported) as raised:
        found.forward(**operands(gate=gate, mask=np.ones((1, 2, 3), bool), return_lse=True))
    assert set(raised.value.reasons) == {"returning lse", "operand mask", "operand gate"}
    assert raised.value.implementation == "bare"


def test_a_function_is_guarded_against_wrong_calls() -> None:
    found = adopt(lambda q, k, v, **more: q, framework="numpy")
    with pytest.raises(ValueError, match="k must have 5 axes"):
        found.forward(**operands(k=np.ones((2, 3), np.float32)))
    with pytest.raises(ValueError, match="scale must be finite"):
        found.forward(**operands(), scale=float("nan"))


def test_a_callable_object_is_a_function() -> None:
    class Callable:
        def __call__(self, q: Any, k: Any, v: Any) -> Any:
            return q

    assert adopt(Callable()).name == "Callable"
    assert adopt(Callable(), framework="numpy").capabilities.operands == frozenset()


def test_implementations_are_values() -> None:
    assert isinstance(adopt(Kernel), Implementation)
    assert adopt(Kernel) == adopt(Kernel)
    assert hash(NUMPY) == hash(replace(NUMPY))


# Several operations under one name


class Two:
    """Two operations, each with a declaration of its own."""

    name = "two"
    framework = "numpy"
    capabilities = (
        CAPABILITIES,
        Capabilities("rotary_embedding", operands=BASIC, gradients=frozenset({"x"}), lse=False),
    )
    evoformer_attention = staticmethod(evoformer_attention)
    evoformer_attention_backward = staticmethod(evoformer_attention_backward)
    rotary_embedding = staticmethod(rotary_embedding)
    rotary_embedding_backward = staticmethod(rotary_embedding_backward)


def test_an_object_may_offer_several_operations() -> None:
    found = adopt(Two, name="renamed")
    assert [one.operation for one in found.offers] == [NAME, "rotary_embedding"]
    assert {one.name for one in found.offers} == {"renamed"}
    assert not any(one.others for one in found.offers)
    rotary = found.of("rotary_embedding")
    assert rotary is not None
    assert (rotary.forward, rotary.backward) == (rotary_embedding, rotary_embedding_backward)
    assert found.of("attention") is None


def test_each_of_several_operations_must_be_there() -> None:
    class Half(Two):
        rotary_embedding_backward = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="has no rotary_embedding_backward"):
        adopt(Half)
    with pytest.raises(TypeError, match="capabilities must be Capabilities, got tuple"):
        adopt(SimpleNamespace(capabilities=(), framework="numpy"))


def test_one_operation_is_offered_by_itself() -> None:
    assert adopt(Kernel).offers == (adopt(Kernel),)


def test_which_operation_a_function_is_can_be_said() -> None:
    def attention(q: Any, k: Any, v: Any, *, causal: bool = False) -> Any:
        return q

    assert adopt(attention).operation == NAME
    assert adopt(attention, operation="attention").capabilities.operands == {"causal"}


def test_a_function_that_takes_the_operands_of_an_operation_is_that_operation() -> None:
    def turn(x: Any, positions: Any, *, layout: str = "half") -> Any:
        return x + 1

    found = adopt(turn, framework="numpy")
    assert found.operation == "rotary_embedding"
    assert found.capabilities.operands == BASIC | {"layout=interleaved"}
    assert not found.capabilities.lse
    assert adopt(turn).capabilities.gradients == {"x"}
    x = np.zeros((1, 3, 2, 8), np.float32)
    assert (found.forward(x=x, positions=np.arange(3)) == 1).all()
    assert (found.forward(x, np.arange(3), layout="interleaved") == 1).all()
    with pytest.raises(Unsupported) as raised:
        found.forward(x=x, positions=np.arange(3), rotary_dim=4)
    assert raised.value.reasons == ("rotary_dim<D",)
    with pytest.raises(ValueError, match="layout must be one of"):
        found.forward(x=x, positions=np.arange(3), layout="thirds")
