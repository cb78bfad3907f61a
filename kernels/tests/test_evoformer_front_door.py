"""Without a GPU: what the front doors refuse, and how; what is asked of the kernels behind them."""

import subprocess
import sys

import numpy as np
import pytest

from isoform.kernels import evoformer, evoformer_attention, evoformer_attention_backward, explain
from isoform.kernels.deepspeed import DS4Sci_EvoformerAttention
from isoform.reference.contract import Unsupported


def operands(dtype="float32", **sizes):
    shape = dict(zip("BSQKHGD", (1, 2, 3, 4, 2, 1, 5), strict=True)) | sizes
    B, S, Q, K, H, G, D = shape.values()
    return {
        "q": np.ones((B, S, Q, H, D), dtype),
        "k": np.ones((B, S, K, G, D), dtype),
        "v": np.ones((B, S, K, G, D), dtype),
    }


def test_importing_it_imports_neither_torch_nor_cupy():
    code = (
        "import sys, isoform.kernels, isoform.kernels.deepspeed;"
        "sys.exit(bool({'torch', 'cupy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_on_a_cpu_is_declined_with_the_remedy():
    with pytest.raises(Unsupported, match=r"device cpu.*move the operands to a GPU"):
        evoformer_attention(**operands())


def test_every_reason_is_given():
    with pytest.raises(Unsupported) as raised:
        evoformer_attention(**operands("float64", D=300))
    text = " ".join(raised.value.reasons)
    for reason in ("device cpu", "dtype float64", "head dim D=300"):
        assert reason in text


def test_a_wrong_call_is_wrong_before_it_is_unsupported():
    with pytest.raises(ValueError, match="k must have D=5"):
        evoformer_attention(**operands() | {"k": np.ones((1, 2, 4, 1, 6), "f4")})
    with pytest.raises(TypeError, match="v must be an array"):
        explain(**operands() | {"v": None})


def test_the_backward_checks_its_cotangent_first():
    with pytest.raises(ValueError, match="dout must have the shape of q"):
        evoformer_attention_backward(np.ones((1, 2, 3, 2, 4), "f4"), **operands())
    with pytest.raises(TypeError, match="dout must be float32"):
        evoformer_attention_backward(np.ones((1, 2, 3, 2, 5), "f8"), **operands())
    with pytest.raises(TypeError, match="dout must be an array, got NoneType"):
        evoformer_attention_backward(None, **operands())
    with pytest.raises(Unsupported, match="device cpu"):
        evoformer_attention_backward(np.ones((1, 2, 3, 2, 5), "f4"), **operands())


def test_explain_names_each_kernel_and_why_it_declines():
    explained = explain(**operands())
    assert list(explained) == ["cuda-tensor", "cuda-plain"]
    assert list(explain(**operands(), low_memory=True)) == ["cuda-tensor-low-memory", "cuda-plain"]
    assert all(any("device cpu" in reason for reason in why) for why in explained.values())
    assert any("dtype float32" in reason for reason in explained["cuda-tensor"])
    assert not any("dtype" in reason for reason in explained["cuda-plain"])


def on_a_gpu(monkeypatch, architecture="sm_90"):
    monkeypatch.setattr(evoformer, "whereabouts", lambda x: ("cuda", architecture))


def test_explain_says_which_kernel_would_run(monkeypatch):
    on_a_gpu(monkeypatch)
    assert explain(**operands("float16"), deterministic=True)["cuda-tensor"] == ()
    on_a_gpu(monkeypatch, "sm_75")
    explained = explain(**operands("float16"))
    assert any("sm_75" in reason for reason in explained["cuda-tensor"])
    assert explained["cuda-plain"] == ()


@pytest.mark.parametrize("attention", [evoformer_attention, evoformer_attention_backward])
def test_a_kernel_asked_for_by_name_runs_or_says_why_not(attention, monkeypatch):
    dout = [operands()["q"]] if attention is evoformer_attention_backward else []
    with pytest.raises(ValueError, match=r"must be one of cuda-tensor, .*, got 'fastest'"):
        attention(*dout, **operands(), kernel="fastest")
    on_a_gpu(monkeypatch)
    with pytest.raises(Unsupported, match="cuda-tensor: dtype float32") as raised:
        attention(*dout, **operands(), kernel="cuda-tensor")
    assert len(raised.value.reasons) == 1


class Recorded(Exception):
    """What a call was made with."""


@pytest.fixture
def recorded(monkeypatch):
    def record(*arguments, **named):
        raise Recorded(arguments, named)

    monkeypatch.setattr("isoform.kernels.deepspeed.evoformer_attention", record)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_deepspeeds_conventions(recorded, leading):
    N, L, H, D = 3, 5, 2, 4
    Q, K, V = (np.zeros((*leading, N, L, H, D)) for _ in "QKV")
    biases = [np.zeros((*leading, N, 1, 1, L)), np.zeros((*leading, 1, H, L, L))]
    with pytest.raises(Recorded) as raised:
        DS4Sci_EvoformerAttention(Q, K, V, biases)
    arguments, named = raised.value.args
    B = int(np.prod(leading))
    assert [x.shape for x in arguments] == [(B, N, L, H, D)] * 3
    assert named["mask_bias"].shape == (B, N, 1, 1, L)
    assert named["pair_bias"].shape == (B, 1, H, L, L)


@pytest.mark.parametrize("biases", [[], [None], [None, None]])
def test_deepspeeds_biases_may_be_missing(recorded, biases):
    with pytest.raises(Recorded) as raised:
        DS4Sci_EvoformerAttention(*(np.zeros((1, 3, 5, 2, 4)) for _ in "QKV"), biases)
    assert raised.value.args[1] == {"mask_bias": None, "pair_bias": None}


def test_deepspeeds_wrong_calls_are_named():
    three = [np.zeros((1, 3, 5, 2, 4)) for _ in "QKV"]
    with pytest.raises(ValueError, match="biases must be at most 2, got 3"):
        DS4Sci_EvoformerAttention(*three, [None] * 3)
    with pytest.raises(ValueError, match="K must be"):
        DS4Sci_EvoformerAttention(three[0], np.zeros((2, 4)), three[2], [])
