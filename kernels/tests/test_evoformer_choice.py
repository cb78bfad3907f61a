"""Which kernel does a call: the first that does not decline, each with its reasons."""

import re

import pytest

from isoform.kernels.choice import BY_NAME, EAGER, KERNELS, LOW_MEMORY, reasons, select
from isoform.reference.contract import Call, Shape, Unsupported


def a_call(dtype="bfloat16", D=32, architecture="sm_90", device="cuda"):
    shape = Shape(1, 2, 17, 33, 4, 2, D)
    return Call("evoformer_attention", shape, dtype, device=device, architecture=architecture)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("D", [1, 8, 127, 128])
def test_the_tensor_core_kernel_comes_first(dtype, architecture, D):
    assert select(a_call(dtype, D, architecture), deterministic=True).name == "cuda-tensor"


DECLINED = {
    "dtype float32": {"dtype": "float32"},
    "head dim D=129": {"D": 129},
    "sm_75": {"architecture": "sm_75"},
}


@pytest.mark.parametrize(("reason", "what"), DECLINED.items(), ids=DECLINED)
def test_what_it_declines_the_plain_kernel_does(reason, what):
    call = a_call(**what)
    (said,) = reasons(BY_NAME["cuda-tensor"], call)
    assert reason in said
    assert reasons(BY_NAME["cuda-plain"], call) == ()
    assert select(call).name == "cuda-plain"
    with pytest.raises(Unsupported, match=f"cuda-tensor: .*{re.escape(reason)}") as raised:
        select(call, only="cuda-tensor")
    assert len(raised.value.reasons) == 1  # of the kernel that was asked for, and of no other


def test_a_kernel_can_be_asked_for():
    assert [select(a_call(), only=kernel.name) for kernel in KERNELS] == list(KERNELS)


def test_special_kernels_are_taken_eagerly_by_who_asks_for_it():
    call = a_call()
    assert select(call, only="cuda-tensor-eager") is EAGER
    assert select(call) is not EAGER
    assert "cuda-tensor-eager" not in [kernel.name for kernel in KERNELS]


def test_where_memory_is_short_the_passes_that_take_more_are_not_used():
    call = a_call()
    assert select(call, low_memory=True) is LOW_MEMORY
    assert select(a_call("float32"), low_memory=True).name == "cuda-plain"
    with pytest.raises(Unsupported, match="cuda-tensor: low_memory=True"):
        select(call, low_memory=True, only="cuda-tensor")


def test_a_name_that_there_is_not_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"one of cuda-tensor, .*-eager, got 'cuda-magic'"):
        select(a_call(), only="cuda-magic")


def test_where_all_decline_every_reason_of_every_kernel_is_given():
    with pytest.raises(Unsupported) as raised:
        select(a_call("float64", D=300, architecture="sm_75"))
    said = raised.value.reasons
    expected = {"cuda-tensor": ("float64", "D=300", "sm_75"), "cuda-plain": ("float64", "D=300")}
    for kernel, reasons_of in expected.items():
        of_it = [reason for reason in said if reason.startswith(f"{kernel}: ")]
        assert len(of_it) == len(reasons_of)
        assert all(any(what in reason for reason in of_it) for what in reasons_of)
    assert any("isoform.reference.torch computes in float64" in reason for reason in said)


def test_all_kernels_are_deterministic():
    """Both sum in a fixed order: deterministic=True takes neither away."""
    assert all(kernel.capabilities.deterministic for kernel in KERNELS)
