"""Which kernel does a call of attention over a sequence, and what the others say."""

from dataclasses import replace

import pytest

from isoform.kernels import attention_choice
from isoform.kernels.attention_arguments import NO_END, Options
from isoform.kernels.attention_choice import (
    BY_NAME,
    KERNELS,
    ORDERS,
    Order,
    Wish,
    order_of,
    reasons,
    select,
    without_idle_places,
)
from isoform.reference.attention_contract import OPTIONS, SequenceShape
from isoform.reference.contract import Call, Unsupported

ALL = frozenset(OPTIONS)
OURS = Wish(torch=False, scale=0.125)


def call(dtype="bfloat16", architecture="sm_90", operands=frozenset(), device="cuda", **sizes):
    shape = SequenceShape(**{"B": 1, "Q": 64, "K": 64, "H": 4, "G": 4, "D": 64} | sizes)
    return Call(
        "attention", shape, dtype, frozenset(operands), device=device, architecture=architecture
    )


@pytest.fixture
def libraries(monkeypatch):
    """Flash attention and cuDNN are to be had."""
    library = pytest.importorskip("isoform.kernels.attention_library", exc_type=ImportError)
    monkeypatch.setattr(library, "MISSING", {"cuda-flash": (), "cuda-cudnn": ()})
    return Wish(torch=True, scale=0.125)


def test_every_order_names_every_kernel_and_the_last_order_fits_all():
    assert all(sorted(order.kernels) == sorted(BY_NAME) for order in ORDERS)
    assert Order(ORDERS[-1].kernels) == ORDERS[-1]


def test_the_first_order_that_fits_is_taken(monkeypatch):
    flash, tensor = (
        Order((name, *sorted(BY_NAME.keys() - {name}))) for name in ("cuda-flash", "cuda-tensor")
    )
    long = Order(flash.kernels, frozenset({"sm_90"}), (64, 128), least=4096)
    monkeypatch.setattr(attention_choice, "ORDERS", (long, tensor))
    assert order_of(call(K=4096))[0].name == "cuda-flash"
    for other in (
        call(K=4095),
        call(K=4096, D=63),
        call(K=4096, D=129),
        call("float16", "sm_80", K=4096),
    ):
        assert order_of(other)[0].name == "cuda-tensor"


@pytest.mark.parametrize("D", [64, 128, 256])
def test_on_hopper_cudnn_comes_first_where_it_was_measured(D, libraries):
    long = call(K=4096, Q=4096, D=D, G=2, operands={"causal"})
    assert select(long, libraries).name == "cuda-cudnn"
    assert select(call(K=1023, Q=1023, D=64), libraries).name == "cuda-tensor"
    assert select(replace(long, architecture="sm_80"), libraries).name == (
        "cuda-tensor" if D <= 128 else "cuda-flash"
    )
    for wish in ({"deterministic": True}, {"low_memory": True}, {"wide": True}):
        ours = "cuda-tensor" if D <= 128 else "cuda-plain"
        assert select(long, replace(libraries, **wish)).name == ours


@pytest.mark.parametrize("operands", [frozenset(), {"causal"}, ALL])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensor_cores_do_16_bits_under_any_mask(dtype, operands):
    assert select(call(dtype, operands=operands, G=2), OURS).name == "cuda-tensor"


@pytest.mark.parametrize(
    "asked", [{"dtype": "float32"}, {"architecture": "sm_75"}, {"D": 129}, {"D": 256}]
)
def test_the_plain_kernel_does_the_rest(asked):
    assert select(call(**asked, operands=ALL), OURS).name == "cuda-plain"


@pytest.mark.parametrize("name", ["cuda-flash", "cuda-cudnn"])
@pytest.mark.parametrize("operands", [frozenset(), {"causal"}])
def test_the_libraries_do_what_they_know(name, operands, libraries):
    assert reasons(BY_NAME[name], call(operands=operands), libraries) == ()
    assert select(call(operands=operands), libraries, name).name == name


@pytest.mark.parametrize("name", ["cuda-flash", "cuda-cudnn"])
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"operands": {"segments"}}, "operand segments"),
        ({"operands": {"causal", "window"}}, "operand window"),
        ({"operands": {"causal", "positions"}}, "operand positions"),
        ({"D": 264}, "head dim D=264"),
        ({"D": 256, "architecture": "sm_89"}, "head dim 256 on sm_89"),
        ({"D": 20}, "multiples of 8 only"),
        ({"dtype": "float32"}, "dtype float32"),
        ({"K": 0}, "at least"),
    ],
)
def test_what_libraries_do_not_know_they_decline(name, asked, reason, libraries):
    assert any(reason in said for said in reasons(BY_NAME[name], call(**asked), libraries))
    with pytest.raises(Unsupported, match=reason):
        select(call(**asked), libraries, name)


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (Wish(torch=True, scale=0.0), "scale 0"),
        (Wish(torch=True, scale=-1.0), "scale -1"),
        (Wish(torch=True, scale=1.0, wide=True), "results in float32"),
        (Wish(torch=True, scale=1.0, deterministic=True), "deterministic=True"),
        (Wish(torch=True, scale=1.0, low_memory=True), "low_memory=True"),
        (Wish(torch=False, scale=1.0), "no tensors of PyTorch's"),
    ],
)
def test_nor_do_they_do_what_a_caller_wishes(wish, reason, libraries):
    (said,) = reasons(BY_NAME["cuda-flash"], call(), wish)
    assert reason in said
    assert reasons(BY_NAME["cuda-tensor"], call(), wish) == ()


def test_a_library_that_is_missing_says_so(monkeypatch):
    library = pytest.importorskip("isoform.kernels.attention_library", exc_type=ImportError)
    monkeypatch.setattr(library, "MISSING", dict.fromkeys(library.MISSING, ("not built",)))
    with pytest.raises(Unsupported, match="cuda-cudnn: not built"):
        select(call(), Wish(torch=True, scale=1.0), "cuda-cudnn")


def test_every_reason_of_every_kernel_is_given():
    with pytest.raises(Unsupported) as raised:
        select(call("float64", device="cpu", architecture="", D=300), OURS)
    for kernel in KERNELS:
        said = " ".join(x for x in raised.value.reasons if x.startswith(f"{kernel.name}: "))
        for reason in ("device cpu", "dtype float64", "head dim D=300"):
            assert reason in said


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match=r"kernel must be one of cuda-cudnn.*got 'fastest'"):
        select(call(), OURS, "fastest")


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (Options(), True),
        (Options(wide=True), True),
        (Options(right=0), False),
        (Options(NO_END, 5), False),
    ],
)
def test_positions_that_no_window_asks_for_are_dropped(options, idle):
    asked = call(operands={"positions", "key_positions", "segments"})
    left = without_idle_places(asked, options).operands
    assert left == ({"segments"} if idle else asked.operands)
