"""The emulated tensor-core and copy instructions, against NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isoform.kernels.emulate import HostCompilerUnavailable, KernelFault, build, host_compiler

try:
    host_compiler()
except HostCompilerUnavailable as missing:
    pytest.skip(f"not run: {missing}", allow_module_level=True)

PRELUDE = """
#include "emulated_primitives.h"

struct Arguments {
    const void *a, *b;
    float* c;
};
#define KERNEL(name) extern "C" __global__ void name(const Arguments arguments)
"""

# One warp multiplies A [16, 16] with B [16, 8], as a kernel would: through shared memory, the
# fragments of A and B read by ldmatrix, those of B transposed on the way.
MULTIPLY = """
KERNEL(multiply) {
    __shared__ __align__(16) ELEMENT a[16][16];
    __shared__ __align__(16) ELEMENT b[16][8];
    const int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
    cp_async_16(&a[lane / 2][lane % 2 * 8], static_cast<const ELEMENT*>(arguments.a) + lane * 8);
    if (lane < 16) {
        cp_async_16(&b[lane][0], static_cast<const ELEMENT*>(arguments.b) + lane * 8);
    }
    cp_async_commit();
    WAIT
    __syncthreads();
    unsigned fragments_a[4], matrices[4];
    ldmatrix_x4(fragments_a, &a[lane % 16][lane / 16 * 8]);
    ldmatrix_x4_trans(matrices, &b[lane % 16][0]);
    const unsigned fragments_b[2] = {matrices[0], matrices[1]};
    float* c = arguments.c;
    float sums[4] = {c[8 * group + pair], c[8 * group + pair + 1], c[8 * (group + 8) + pair],
                     c[8 * (group + 8) + pair + 1]};
    mma_m16n8k16<ELEMENT>(sums, fragments_a, fragments_b);
    c[8 * group + pair] = sums[0];
    c[8 * group + pair + 1] = sums[1];
    c[8 * (group + 8) + pair] = sums[2];
    c[8 * (group + 8) + pair + 1] = sums[3];
}
"""


class Arguments(ctypes.Structure):
    _fields_ = (("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("c", ctypes.c_void_p))


def run(folder: Path, source: str, kernel: str, *arrays: Any, **defines: str) -> None:
    """Build in ``folder`` and launch one warp."""
    (folder / "kernel.cu").write_text(PRELUDE + source)
    addresses = [array.ctypes.data for array in arrays]
    program = build("kernel", folder=folder, defines=defines)
    program.launch(kernel, grid=(1,), block=(32,), arguments=bytes(Arguments(*addresses)))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for all: what runs the threads is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ISOFORM_CACHE_DIR", str(folder))
        yield folder


@pytest.mark.parametrize("element", ["__half", "__nv_bfloat16"])
def test_a_warp_multiplies_matrices(tmp_path: Path, element: str) -> None:
    if element == "__half":
        dtype: Any = np.float16
    else:
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(0)
    # small integers: every sum is exact, so the result is the product bit by bit
    a, b, c = (rng.integers(-8, 9, shape) for shape in ((16, 16), (16, 8), (16, 8)))
    sums = c.astype(np.float32)
    run(tmp_path, MULTIPLY, "multiply", a.astype(dtype), b.astype(dtype), sums,
        ELEMENT=element, WAIT="cp_async_wait<0>();")  # fmt: skip
    np.testing.assert_array_equal(sums, a @ b + c)


def test_a_copy_that_nobody_waits_for_has_not_arrived(tmp_path: Path) -> None:
    a, b = np.ones((16, 16), np.float16), np.ones((16, 8), np.float16)
    for wait in ("", "cp_async_wait<1>();"):
        sums = np.zeros((16, 8), np.float32)
        run(tmp_path, MULTIPLY, "multiply", a, b, sums, ELEMENT="__half", WAIT=wait)
        assert np.isnan(sums).all()


def test_groups_of_copies_arrive_in_turn(tmp_path: Path) -> None:
    source = """
    KERNEL(groups) {
        __shared__ __align__(16) float parts[32][3][4];
        float(*mine)[4] = parts[threadIdx.x];
        for (int i = 0; i < 3; ++i) {
            cp_async_16(mine[i], static_cast<const float*>(arguments.a) + 4 * i, i != 1);
            cp_async_commit();
        }
        cp_async_wait<1>();
        for (int i = 0; i < 3; ++i) {
            arguments.c[3 * threadIdx.x + i] = mine[i][3];
        }
    }"""
    numbers, found = np.arange(1, 13, dtype=np.float32), np.zeros((32, 3), np.float32)
    run(tmp_path, source, "groups", numbers, numbers, found)
    assert (found[:, :2] == [4, 0]).all()
    assert np.isnan(found[:, 2]).all()


@pytest.mark.parametrize(
    "call", ["cp_async_16(arguments.c, arguments.c + 1);", "ldmatrix_x4(r, arguments.c + 1);"]
)
def test_addresses_are_aligned(tmp_path: Path, call: str) -> None:
    numbers = np.zeros(64, np.float32)
    numbers = numbers[-(numbers.ctypes.data // 4) % 4 :]
    source = f"KERNEL(crooked) {{ unsigned r[4]; (void)r; {call} }}"
    with pytest.raises(KernelFault, match=r"multiple of 16 bytes"):
        run(tmp_path, source, "crooked", numbers, numbers, numbers)


# One lane writes, eight times, what the others then read: none goes on before all have read.
SIGNALS = """
KERNEL(signals) {
    __shared__ Signal written, read;
    __shared__ int number;
    if (threadIdx.x == 0) expect(&written, 1), expect(&read, 31);
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < 8; ++i) {
        if (threadIdx.x == 0) {
            WAIT(&read, 1 - i % 2);
            number = i * i;
            arrive(&written);
        } else {
            wait_for(&written, i % 2);
            sum += number;
            READ
        }
    }
    arguments.c[threadIdx.x] = sum;
}"""


def signal(folder: Path, read: str = "arrive(&read);", wait: str = "wait_for") -> Any:
    found = np.full(32, np.nan, np.float32)
    run(folder, SIGNALS, "signals", found, found, found, READ=read, WAIT=wait)
    return found


def test_signals_are_waited_for(tmp_path: Path) -> None:
    assert signal(tmp_path).tolist() == [0] + 31 * [sum(i * i for i in range(8))]


def test_who_does_not_wait_is_seen(tmp_path: Path) -> None:
    with pytest.raises(
        KernelFault, match=r"wait for each other: 1 have returned, 31 wait at wait_for"
    ):
        signal(tmp_path, wait="(void)")


def test_a_signal_that_nobody_gives_is_a_deadlock(tmp_path: Path) -> None:
    with pytest.raises(KernelFault, match=r"wait for each other: 1 wait at wait_for"):
        signal(tmp_path, read="")


def test_who_is_not_expected_may_not_arrive(tmp_path: Path) -> None:
    with pytest.raises(KernelFault, match="where nobody is expected"):
        run(
            tmp_path,
            "KERNEL(poison) { __shared__ Signal none; arrive(&none); }",
            "poison",
            *(np.zeros(1) for _ in range(3)),
        )


# A box of 8 rows of BOX columns of an array of 6 × 20, from column 8 and row −1 on. It is read
# before and after somebody has waited for it.
FETCH = """
KERNEL(fetch) {
    alignas(1024) __shared__ unsigned short tile[8 * BOX];
    __shared__ Signal there;
    TileMap map{};
    map.address = reinterpret_cast<std::uint64_t>(arguments.a);
    const std::int64_t sizes[5] = {20, 6, 1, 1, 1}, steps[4] = {40, 16, 16, 16};
    std::memcpy(map.sizes, sizes, sizeof sizes), std::memcpy(map.steps, steps, sizeof steps);
    map.box[0] = BOX, map.box[1] = 8;
    if (threadIdx.x == 0) {
        expect(&there, 1);
        for (int i = 0; i < 8 * BOX; ++i) tile[i] = 7;
        arrive_expecting(&there, BYTES);
        fetch_tile(tile + OFF, map, 8, -1, 0, 0, 0, &there);
        arguments.c[0] = tile[BOX];
    }
    __syncthreads();
    wait_for(&there, 0);
    for (int i = threadIdx.x; i < 8 * BOX; i += 32) arguments.c[1 + i] = tile[i];
}"""


def fetch(folder: Path, box: int, off: int = 0, size: int | None = None) -> Any:
    array = np.zeros(64, np.float32)
    array.view(np.uint16)[:120] = np.arange(1, 121)
    found = np.full(1 + 8 * box, np.nan, np.float32)
    given = {"BOX": box, "OFF": off, "BYTES": 16 * box if size is None else size}
    run(folder, FETCH, "fetch", array, array, found, **given)
    return found


@pytest.mark.parametrize(("box", "swizzle"), [(16, lambda r: r // 4 % 2), (64, lambda r: r % 8)])
def test_a_tile_arrives_swizzled_with_zeros_where_there_is_nothing(
    tmp_path: Path, box: int, swizzle: Callable[[int], int]
) -> None:
    before, *found = fetch(tmp_path, box).tolist()
    assert before == 7  # as late as the device may
    wide = np.zeros((8, 64), int)
    wide[1:7, :12] = np.arange(1, 121).reshape(6, 20)[:, 8:]
    pieces = wide[:, :box].reshape(8, -1, 8)
    expected = [[row[p ^ swizzle(r)] for p in range(box // 8)] for r, row in enumerate(pieces)]
    assert np.array_equal(np.reshape(found, (8, -1, 8)), expected)


def test_a_tile_of_other_bytes_than_expected_is_waited_for_forever(tmp_path: Path) -> None:
    with pytest.raises(KernelFault, match=r"wait for each other: 32 wait at wait_for"):
        fetch(tmp_path, 16, size=8 * 16)


def test_where_a_tile_arrives_is_aligned(tmp_path: Path) -> None:
    with pytest.raises(KernelFault, match=r"no multiple of 256 bytes .* fetch_tile"):
        fetch(tmp_path, 16, off=8)
