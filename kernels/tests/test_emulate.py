"""The emulator runs right kernels, and catches wrong ones: each fault is planted once here."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isoform.kernels.emulate import (
    CANNOT_SEE,
    ORDERS,
    CompilationFailed,
    HostCompilerUnavailable,
    KernelFault,
    Order,
    build,
    check,
    host_compiler,
)
from isoform.kernels.emulate import __main__ as command
from isoform.kernels.emulate import program as emulator
from isoform.kernels.emulate.sanitized import environment

try:
    host_compiler()
except HostCompilerUnavailable as missing:
    pytest.skip(f"not run: {missing}", allow_module_level=True)

PRELUDE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/cstdint>

struct Arguments {
    const void* source;
    void* target;
    cuda::std::int64_t size;
};
#define KERNEL(name) \\
    extern "C" __global__ void __launch_bounds__(128) name(const Arguments arguments)
"""

# The sum of `size` numbers, by one block: registers, shuffles, shared memory.
SUM = """
KERNEL(sum) {
    __shared__ float parts[4];
    __shared__ float total;
    const float* source = static_cast<const float*>(arguments.source);
    float part = 0.0f;
    for (int i = threadIdx.x; i < arguments.size; i += blockDim.x) {
        part += source[i];
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        part += __shfl_xor_sync(0xffffffffu, part, distance);
    }
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32] = part;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        total = parts[0] + parts[1] + parts[2] + parts[3];
    }
    __syncthreads();
    static_cast<float*>(arguments.target)[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
"""


class Arguments(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("size", ctypes.c_int64),
    )


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for all: what runs the threads is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ISOFORM_CACHE_DIR", str(folder))
        yield folder


def program(folder: Path, source: str, **defines: int | str) -> Any:
    (folder / "kernel.cu").write_text(PRELUDE + source)
    return build("kernel", folder=folder, defines=defines)


def run(
    program: Any,
    kernel: str,
    source: Any,
    target: Any,
    *,
    block: int = 128,
    grid: int = 1,
    shared_bytes: int = 0,
    order: Order = "forward",
) -> Any:
    arguments = Arguments(source.ctypes.data, target.ctypes.data, source.size)
    program.launch(
        kernel,
        grid=(grid,),
        block=(block,),
        arguments=bytes(arguments),
        shared_bytes=shared_bytes,
        order=order,
    )
    return target


NUMBERS = np.arange(1000, dtype=np.float32)


def results(program: Any, kernel: str = "sum") -> list[Any]:
    """The result in every order."""
    return [
        run(program, kernel, NUMBERS, np.zeros(256, np.float32), grid=2, order=order)
        for order in ORDERS
    ]


def test_a_right_kernel_gives_the_same_in_every_order(tmp_path: Path) -> None:
    for result in results(program(tmp_path, SUM)):
        np.testing.assert_array_equal(result, np.full(256, NUMBERS.sum()))


@pytest.mark.parametrize("which", [0, 1])
def test_a_removed_barrier_is_caught(tmp_path: Path, which: int) -> None:
    parts = SUM.split("__syncthreads();")
    parts[which : which + 2] = ["".join(parts[which : which + 2])]
    found = results(program(tmp_path, "__syncthreads();".join(parts)))
    assert not all(np.array_equal(result, found[0]) for result in found[1:])
    assert any(np.isnan(result).any() for result in found)  # shared memory held NaN


def test_shared_memory_is_poisoned_before_each_block(tmp_path: Path) -> None:
    source = """
    template <int N> __device__ float* piece() {
        __shared__ float kept[N];
        return kept;
    }
    KERNEL(stale) {
        float* target = static_cast<float*>(arguments.target);
        extern __shared__ float dynamic[];
        target[2 * blockIdx.x] = piece<3>()[0];
        target[2 * blockIdx.x + 1] = dynamic[7];
        piece<3>()[0] = dynamic[7] = 1.0f;
    }"""
    stale = program(tmp_path, source)
    target = np.zeros(8, np.float32)
    run(stale, "stale", NUMBERS, target, block=1, grid=4, shared_bytes=32)
    assert np.isnan(target).all()


def test_dynamic_shared_memory_holds_what_is_written(tmp_path: Path) -> None:
    source = """
    KERNEL(reversed) {
        extern __shared__ __align__(16) unsigned char memory[];
        float* numbers = reinterpret_cast<float*>(memory);
        const int i = threadIdx.x;
        numbers[i] = static_cast<const float*>(arguments.source)[i];
        __syncthreads();
        static_cast<float*>(arguments.target)[i] = numbers[blockDim.x - 1 - i];
    }"""
    target = np.zeros(100, np.float32)
    run(program(tmp_path, source), "reversed", NUMBERS, target, block=100, shared_bytes=400)
    np.testing.assert_array_equal(target, NUMBERS[99::-1])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "if (threadIdx.x >= 32) __syncthreads();",
            ["has returned", "waits at __syncthreads (", "kernel.cu:{line})"],
        ),
        (
            "if (threadIdx.x == 5) return;\n__syncthreads();",
            ["thread (5, 0, 0) has returned", "__syncthreads ("],
        ),
        (
            "if (threadIdx.x < 64) __syncthreads();\nelse\n__syncthreads();",
            ["kernel.cu:{line})", "kernel.cu:{third})", "same barrier"],
        ),
        (
            "if (threadIdx.x == 40) return;\n__syncwarp();",
            ["thread (40, 0, 0)", "__syncwarp"],
        ),
        (
            "if (threadIdx.x < 16) __shfl_xor_sync(0xffffffffu, 1, 1); else __syncthreads();",
            ["wait for each other", "16 wait at __shfl_xor_sync", "wait at __syncthreads"],
        ),
        (
            "if (threadIdx.x % 2) __shfl_sync(0xaaaaaaaau, 1, 0);",
            ["reads lane 0 in __shfl_sync", "does not take part"],
        ),
        ("__syncwarp(1u);", ["mask without its own lane"]),
        (
            "if (threadIdx.x % 32 < 3) __any_sync(0xffffffffu, 1);\n"
            "else __all_sync(0xffffffffu, 1);",
            ["__any_sync", "__all_sync"],
        ),
    ],
)
def test_what_is_undefined_is_an_error(tmp_path: Path, body: str, says: list[str]) -> None:
    source = f"KERNEL(wrong) {{\n{body}\n}}"
    line = (PRELUDE + source).splitlines().index(body.splitlines()[0]) + 1
    wrong = program(tmp_path, source)
    for order in ORDERS:
        with pytest.raises(KernelFault, match=r"^wrong: block \(0, 0, 0\): ") as caught:
            run(wrong, "wrong", NUMBERS, np.zeros(1, np.float32), order=order)
        for words in says:
            assert words.format(line=line, third=line + 2) in str(caught.value)


def test_after_a_fault_the_program_runs_again(tmp_path: Path) -> None:
    source = """
    KERNEL(sometimes) {
        if (arguments.size == 1 && threadIdx.x == 0) return;
        __syncthreads();
        static_cast<float*>(arguments.target)[threadIdx.x] = 1.0f;
    }"""
    sometimes = program(tmp_path, source)
    target = np.zeros(128, np.float32)
    with pytest.raises(KernelFault):
        run(sometimes, "sometimes", NUMBERS[:1], target)
    assert run(sometimes, "sometimes", NUMBERS, target).all()


def maps() -> int:
    """Pieces of memory that the process has mapped."""
    return len(Path("/proc/self/maps").read_text("ascii").splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
def test_a_launch_gives_its_stacks_back_however_it_ends(tmp_path: Path) -> None:
    """A process may have some 65,000 maps, and a thread's stack is two."""
    source = """
    KERNEL(sometimes) {
        if (arguments.size == 1 && threadIdx.x == 0) return;
        __syncthreads();
    }"""
    sometimes = program(tmp_path, source)
    run(sometimes, "sometimes", NUMBERS, NUMBERS)
    before = maps()
    run(sometimes, "sometimes", NUMBERS, NUMBERS)
    with pytest.raises(KernelFault):
        run(sometimes, "sometimes", NUMBERS[:1], NUMBERS)
    assert maps() < before + 32
    for n in range(3):
        other = program(tmp_path, f"{source}\n// {n}")
        run(other, "sometimes", NUMBERS, NUMBERS)
    assert maps() < before + 128  # a library is a few; the stacks of one launch are 256


def test_no_memory_for_stacks_is_an_error(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="no limits can be set here")
    added = program(tmp_path, SUM)
    before = run(added, "sum", NUMBERS, np.zeros(128, np.float32))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), hard))
    try:
        with pytest.raises(KernelFault, match="has no stack"):
            run(added, "sum", NUMBERS, np.zeros(128, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    np.testing.assert_array_equal(run(added, "sum", NUMBERS, np.zeros(128, np.float32)), before)


def test_warp_operations(tmp_path: Path) -> None:
    source = """
    KERNEL(warp) {
        const int i = threadIdx.x;
        int* target = static_cast<int*>(arguments.target) + 10 * i;
        const unsigned all = 0xffffffffu;
        target[0] = __shfl_sync(all, i, 3);
        target[1] = __shfl_xor_sync(all, i, 5);
        target[2] = __shfl_down_sync(all, i, 2);
        target[3] = __shfl_up_sync(all, i, 2, 8);
        target[4] = __ballot_sync(all, i % 2);
        target[5] = __any_sync(all, i == 33);
        target[6] = __all_sync(all, i < 32);
        target[7] = __syncthreads_count(i % 3 == 0);
        target[8] = 10 * __syncthreads_or(i == 7) + __syncthreads_and(i < 63);
        target[9] = __shfl_sync(all, i, 9, 4);
    }"""
    target = np.zeros((64, 10), np.int32)
    run(program(tmp_path, source), "warp", NUMBERS, target, block=64)
    thread = np.arange(64)
    first, lane = thread // 32 * 32, thread % 32
    expected = [
        first + 3,
        thread ^ 5,
        np.where(lane < 30, thread + 2, thread),
        np.where(lane % 8 >= 2, thread - 2, thread),
        np.full(64, np.int32(-1431655766)),
        first == 32,
        first == 0,
        np.full(64, 22),
        np.full(64, 10),
        thread // 4 * 4 + 1,
    ]
    np.testing.assert_array_equal(target, np.stack(expected, 1))


def test_atomics_add_up(tmp_path: Path) -> None:
    source = """
    KERNEL(counted) {
        float* target = static_cast<float*>(arguments.target);
        atomicAdd(target, 1.0f);
        atomicAdd(reinterpret_cast<int*>(target) + 1, 1);
        atomicMax(reinterpret_cast<int*>(target) + 2, static_cast<int>(threadIdx.x));
    }"""
    counted = program(tmp_path, source)
    for order in ORDERS:
        target = run(counted, "counted", NUMBERS, np.zeros(3, np.float32), grid=5, order=order)
        assert target[0] == 640
        assert list(target[1:].view(np.int32)) == [640, 127]


CONVERSIONS = """
KERNEL(narrow) {
    for (cuda::std::int64_t i = 0; i < arguments.size; ++i) {
        const float value = static_cast<const float*>(arguments.source)[i];
        static_cast<NARROW*>(arguments.target)[i] = NARROW(value);
    }
}
KERNEL(widen) {
    for (cuda::std::int64_t i = 0; i < arguments.size; ++i) {
        const NARROW value = static_cast<const NARROW*>(arguments.source)[i];
        static_cast<float*>(arguments.target)[i] = static_cast<float>(value);
    }
}
"""


@pytest.mark.parametrize("narrow", ["__half", "__nv_bfloat16"])
def test_conversions_are_exact(tmp_path: Path, narrow: str) -> None:
    if narrow == "__half":
        dtype: Any = np.float16
    else:
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    conversions = program(tmp_path, CONVERSIONS, NARROW=narrow)
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    widened = run(conversions, "widen", every, np.zeros(every.shape, np.float32), block=1)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(widened, every.astype(np.float32))

        # every number, the middle between it and the next, what lies just beside the middle, and
        # words drawn at random
        middle = (widened[:-1].astype(np.float64) + widened[1:]) / 2
        middle = middle.astype(np.float32)
        draws = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
        beside = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
        values = np.concatenate([widened, middle, *beside, draws.view(np.float32)])
        narrowed = run(conversions, "narrow", values, np.zeros(values.shape, dtype), block=1)
        expected = values.astype(dtype)
    both_nan = (narrowed != narrowed) & (expected != expected)
    same = narrowed.view(np.uint16) == expected.view(np.uint16)
    assert (same | both_nan).all()


def test_definitions_choose_a_variant(tmp_path: Path) -> None:
    source = """
    #if TWICE
    KERNEL(twice) { *static_cast<int*>(arguments.target) = 2 * VALUE; }
    #else
    KERNEL(once) { *static_cast<int*>(arguments.target) = VALUE; }
    #endif"""
    target = np.zeros(1, np.int32)
    first = program(tmp_path, source, VALUE=7, TWICE=0)
    second = program(tmp_path, source, VALUE=8, TWICE=1)
    assert run(first, "once", NUMBERS, target, block=1)[0] == 7
    assert run(second, "twice", NUMBERS, target, block=1)[0] == 16
    with pytest.raises(KernelFault, match="no kernel once"):
        run(second, "once", NUMBERS, target, block=1)


def test_variants_share_nothing(tmp_path: Path) -> None:
    source = """
    inline int& counter() { static int count = 0; return count; }
    KERNEL(count) { *static_cast<int*>(arguments.target) = ++counter() + 0 * VARIANT; }"""
    target = np.zeros(1, np.int32)
    for variant in (0, 1):
        variants = program(tmp_path, source, VARIANT=variant)
        assert run(variants, "count", NUMBERS, target, block=1)[0] == 1


def test_a_program_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = program(tmp_path, SUM)
    written = first.library.stat().st_ino
    assert program(tmp_path, SUM).library.stat().st_ino == written
    header = tmp_path / "header.cuh"
    header.write_text("// a header of the folder counts as source\n")
    assert program(tmp_path, SUM).library != first.library
    assert not list(first.library.parent.glob("tmp*"))  # nothing half-made is left


def test_programs_least_recently_used_go(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISOFORM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    old, used = (program(tmp_path, SUM, VARIANT=n).library for n in range(2))
    for age, library in enumerate((used, old)):
        os.utime(library, (age, age))
    program(tmp_path, SUM, VARIANT=1)  # used again
    held = sum(file.stat().st_size for file in old.parent.iterdir())  # of the runtime too
    monkeypatch.setattr(emulator, "CACHE_BYTES", held + old.stat().st_size // 2)
    new = program(tmp_path, SUM, VARIANT=2).library
    assert set(new.parent.glob("*.so")) == {used, new}


def test_a_source_can_be_checked_without_making_a_program(tmp_path: Path) -> None:
    (tmp_path / "kernel.cu").write_text(f'{PRELUDE}static_assert(SIZE == 8, "eight");{SUM}')
    check("kernel", folder=tmp_path, defines={"SIZE": 8})
    with pytest.raises(CompilationFailed, match="eight"):
        check("kernel", folder=tmp_path, defines={"SIZE": 9})


def test_what_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CompilationFailed, match=r"kernel\.cu.*__nanosleep"):
        program(tmp_path, "KERNEL(late) { __nanosleep(1); }")
    with pytest.raises(CompilationFailed, match="no __global__ function"):
        program(tmp_path, "")
    fine = program(tmp_path, SUM)
    with pytest.raises(KernelFault, match="takes 24 bytes of arguments, got 3"):
        fine.launch("sum", grid=(1,), block=(1,), arguments=b"abc")
    with pytest.raises(KernelFault, match="1024 threads at most"):
        fine.launch("sum", grid=(1,), block=(32, 33), arguments=bytes(24))
    with pytest.raises(KernelFault, match="of shared memory"):
        fine.launch("sum", grid=(1,), block=(32,), arguments=bytes(24), shared_bytes=1 << 20)
    for wrong in ({"grid": ()}, {"grid": (-1,)}, {"block": (0,)}, {"block": (1, 1, 1, 1)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must have one to three sizes"):
            fine.launch("sum", **({"grid": (1,), "block": (1,), "arguments": bytes(24)} | wrong))
    for order in ("sideways", -1):
        with pytest.raises(ValueError, match="order must be"):
            fine.launch("sum", grid=(1,), block=(1,), arguments=bytes(24), order=order)
    fine.launch("sum", grid=(0,), block=(32,), arguments=bytes(24))  # an empty grid is nothing


def test_no_compiler_is_one_clear_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main() == 0
    said = capsys.readouterr().out
    assert all(what in said for what in CANNOT_SEE)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(HostCompilerUnavailable, match="CXX names no-such-compiler"):
        host_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HostCompilerUnavailable, match=r"install g\+\+"):
        host_compiler()
    assert command.main() == 1
    assert "not run" in capsys.readouterr().out


SANITIZED = """
import ctypes, sys
from pathlib import Path
import numpy as np
from isoform.kernels.emulate import build, sanitized
assert sanitized()
source = np.zeros(1000, np.float32)
target = np.zeros(128, np.float32)
arguments = np.array([source.ctypes.data, target.ctypes.data, source.size], np.int64).tobytes()
program = build("kernel", folder=Path(sys.argv[1]))
program.launch(sys.argv[2], grid=(1,), block=(128,), arguments=arguments, shared_bytes=64)
print("finished")
"""

FAULTS = """
KERNEL(store) { static_cast<float*>(arguments.target)[threadIdx.x + 1] = 0.0f; }
KERNEL(load) {
    const float* source = static_cast<const float*>(arguments.source);
    static_cast<float*>(arguments.target)[threadIdx.x] = source[threadIdx.x - 1];
}
KERNEL(aligned) {
    const float* source = static_cast<const float*>(arguments.source) + 1;
    static_cast<float*>(arguments.target)[0] = reinterpret_cast<const float4*>(source)->w;
}
KERNEL(indexed) {
    __shared__ float kept[4][4];
    kept[threadIdx.x % 4][threadIdx.x / 4] = 0.0f;
}
KERNEL(dynamic) {
    extern __shared__ float memory[];
    memory[threadIdx.x] = 0.0f;
}
"""


def test_sanitizers_find_what_lies_out_of_bounds(tmp_path: Path) -> None:
    try:
        environment(tmp_path / "report")
    except HostCompilerUnavailable as missing:
        pytest.skip(f"not run: {missing}")
    (tmp_path / "kernel.cu").write_text(PRELUDE + SUM + FAULTS)
    line = (PRELUDE + SUM + FAULTS).splitlines().index(FAULTS.splitlines()[1]) + 1

    def sanitized(kernel: str) -> subprocess.CompletedProcess[str]:
        module = "isoform.kernels.emulate.sanitized"
        run = [sys.executable, "-m", module, "-c", SANITIZED, str(tmp_path), kernel]
        return subprocess.run(run, capture_output=True, text=True, env=os.environ, check=False)

    fine = sanitized("sum")
    assert fine.returncode == 0, fine.stderr
    assert fine.stdout == "finished\n"
    for kernel, says in {
        "store": "AddressSanitizer: heap-buffer-overflow",
        "load": "AddressSanitizer: ",
        "aligned": "misaligned address",
        "indexed": "out of bounds for type 'float [4]'",
        "dynamic": "AddressSanitizer: use-after-poison",
    }.items():
        found = sanitized(kernel)
        assert found.returncode != 0
        assert says in found.stderr
        assert found.stdout == ""
        if kernel == "store":
            assert f"kernel.cu:{line}" in found.stderr


def test_sanitizers_missing_is_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho libasan.so\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(HostCompilerUnavailable, match=r"has no libasan\.so"):
        environment(tmp_path / "report")
