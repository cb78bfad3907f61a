"""Every variant of every kernel compiles for every architecture, and takes no more than recorded.

These need NVRTC, the CUDA headers (``isoform[cuda13]``) and nvdisasm, neither a GPU nor a driver:
``nox -s compile`` installs them. Where they are missing the tests fail, they do not skip.
"""

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from isoform.kernels import compiler, gate, instructions
from isoform.kernels.compiler import CompileError
from isoform.kernels.gate import Variant

pytestmark = pytest.mark.nvrtc

RECORD = Path(__file__).parents[1] / "compile_gate.jsonl"
COUNTS = RECORD.with_name(gate.INSTRUCTIONS)
VARIANTS = gate.variants()
ANEW = f"python -m isoform.kernels.gate {RECORD.relative_to(Path(__file__).parents[2])}"


@pytest.fixture(scope="module")
def recorded():
    """The recorded figures, if they are of this compiler."""
    version, figures = gate.read(RECORD)
    assert version == gate.compiler_version(), (
        f"recorded with NVRTC {version}, this is {gate.compiler_version()}: "
        f"install that one (ci/constraints.txt), or record anew: {ANEW}"
    )
    return figures


@pytest.fixture(scope="module")
def recorded_counts():
    """The recorded instruction counts, and by what share they may rise."""
    version, may_rise, counts = instructions.read(COUNTS)
    assert version == gate.compiler_version(), f"recorded with NVRTC {version}: {ANEW}"
    return counts, may_rise


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variant(variant, recorded, recorded_counts):
    compiled = variant.compile()
    assert compiled.cubin.startswith(b"\x7fELF")
    assert compiler.warnings(compiled.log) == []
    taken = compiler.resources(compiled.log)
    said = gate.complaints(str(variant), taken, recorded) + gate.spills({str(variant): taken})
    if variant.counted:
        found = instructions.counted(compiled)
        said += instructions.complaints(str(variant), found, *recorded_counts)
    assert not said, "\n".join([*said, f"if that is meant: {ANEW}"])


def test_nothing_is_recorded_that_is_not_compiled(recorded, recorded_counts):
    assert recorded.keys() == {str(variant) for variant in VARIANTS}, f"record anew: {ANEW}"
    counted = {str(variant) for variant in VARIANTS if variant.counted}
    assert recorded_counts[0].keys() == counted, f"record anew: {ANEW}"


def test_every_counted_variant_has_a_hot_loop(recorded_counts):
    """Or else nothing of it is guarded."""
    for variant, kernels in recorded_counts[0].items():
        assert kernels, variant
        for counts in kernels.values():
            assert counts["loop 1"]["exponentials"] > 0
            assert counts["loop 1"]["products"] > 0


# --- The compiler itself, on small kernels --------------------------------------------------------

SCALE = """\
#include "scale.cuh"
#include <cuda/std/cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void scale(Arguments arguments) {
    __shared__ float tile[128];
    const cuda::std::int64_t i = cuda::std::int64_t(blockIdx.x) * 128 + threadIdx.x;
    tile[threadIdx.x] = __bfloat162float(__float2bfloat16(arguments.x[i]));
    __syncthreads();
    arguments.x[i] = FACTOR * tile[127 - threadIdx.x];
}
"""

SCALE_HEADER = "struct Arguments { float* x; };\n"

# Eighty running products in however many registers the launch bounds leave.
PRODUCTS = """\
extern "C" __global__ void __launch_bounds__(1024, BLOCKS) products(float* x) {
    float kept[80];
#pragma unroll
    for (int i = 0; i < 80; ++i) kept[i] = x[i * 1024 + threadIdx.x];
#pragma unroll 1
    for (int round = 0; round < 100; ++round) {
#pragma unroll
        for (int i = 0; i < 80; ++i) kept[i] = kept[i] * kept[(i + 7) % 80] + x[round];
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 80; ++i) x[i * 1024 + threadIdx.x] = kept[i];
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with small kernels, and a cache of their own."""
    (tmp_path / "scale.cu").write_text(SCALE)
    (tmp_path / "scale.cuh").write_text(SCALE_HEADER)
    (tmp_path / "products.cu").write_text(PRODUCTS)
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    monkeypatch.setenv("ISOFORM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def scale(architecture="sm_80", factor="2.0f"):
    return compiler.compile_source("scale", architecture=architecture, defines={"FACTOR": factor})


@pytest.mark.parametrize("architecture", [*gate.ARCHITECTURES, "sm_75", "sm_90a", "sm_100a"])
def test_a_kernel_compiles_without_a_gpu(folder, architecture):
    compiled = scale(architecture)
    assert compiled.cubin.startswith(b"\x7fELF")
    taken = compiler.resources(compiled.log)["scale"]
    assert taken.registers > 0
    assert taken.shared_bytes >= 512  # newer architectures keep some for themselves
    assert taken.spill_stores == taken.spill_loads == taken.stack_bytes == 0


def test_machine_code_is_whole(folder):
    """As ELF says how long it is: CuPy leaves off the last byte."""
    cubin = scale().cubin
    for at, sizes in ((32, 54), (40, 58)):  # of program headers, and of section headers
        (offset,) = struct.unpack_from("<Q", cubin, at)
        size, count = struct.unpack_from("<HH", cubin, sizes)
        assert count
        assert offset + size * count <= len(cubin)


def test_an_error_names_file_and_line(folder):
    (folder / "scale.cuh").write_text(SCALE_HEADER + "float wrong = nothing;\n")
    with pytest.raises(CompileError, match=r'scale\.cuh\(2\): error: identifier "nothing"'):
        scale()


def test_errors_of_the_assembler_are_errors(folder):
    (folder / "scale.cu").write_text(SCALE.replace("tile[128]", "tile[20000]"))
    with pytest.raises(CompileError, match=r"too much shared data"):
        scale()


def test_line_info_is_there_when_asked_for(folder, monkeypatch):
    monkeypatch.delenv("ISOFORM_LINEINFO", raising=False)
    assert b".debug_line" not in scale().cubin
    monkeypatch.setenv("ISOFORM_LINEINFO", "1")
    assert b".debug_line" in scale().cubin


def test_the_gate_sees_a_spill(folder):
    """The same kernel with fewer registers to work with."""
    roomy, tight = (Variant("products", {"BLOCKS": blocks}, "sm_90") for blocks in (1, 2))
    figures, _ = gate.measure([roomy, tight])
    now = figures[str(tight)]
    assert now["products"].spill_stores > figures[str(roomy)]["products"].spill_stores
    said = gate.complaints(str(roomy), now, figures)
    assert any("products has spill_stores" in line for line in said)
    assert gate.complaints(str(tight), now, figures) == []


# A loop with a matrix product, and an exponential of each of its four numbers of a thread.
WEIGHTS = """\
extern "C" __global__ void weights(float* x, unsigned* y, int turns) {
    float sum = 0.0f;
    const unsigned b0 = y[threadIdx.x], b1 = y[threadIdx.x + 32];
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        const unsigned* a = y + 128 * turn + threadIdx.x;
        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[32]), "r"(a[64]), "r"(a[96]), "r"(b0), "r"(b1));
#pragma unroll
        for (int i = 0; i < 4 + EXTRA; ++i) {
            float weight;
            asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(weight) : "f"(c[i % 4] + float(i / 4)));
            sum += weight;
        }
    }
    x[threadIdx.x] = sum;
}
"""


@pytest.mark.parametrize("architecture", sorted(instructions.ARCHITECTURES))
def test_an_exponential_too_many_is_seen(folder, monkeypatch, architecture):
    (folder / "weights.cu").write_text(WEIGHTS)
    monkeypatch.setitem(instructions.PRODUCTS, "weights", 1)

    def counts(extra):
        defines = {"HEAD_DIM": 16, "EXTRA": extra}
        one = compiler.compile_source("weights", architecture=architecture, defines=defines)
        return instructions.counted(one)

    before, after = counts(0), counts(1)
    (loop,) = before["weights"].values()
    assert loop["exponentials"] == 1.0
    assert loop["products"] == 0.25
    assert loop["global_loads"] == 1.0
    assert instructions.complaints("v", before, {"v": before}, 0.03) == []
    said = instructions.complaints("v", after, {"v": before}, 0.03)
    assert "v: weights, loop 1 has 1.25 exponentials a logit, recorded are 1" in said


def test_a_source_without_a_kernel_is_not_recorded(folder):
    (folder / "scale.cu").write_text("")
    with pytest.raises(ValueError, match="no kernels in scale FACTOR=1 sm_80"):
        gate.measure([Variant("scale", {"FACTOR": 1}, "sm_80")])


PROCESS = """
import sys
from pathlib import Path
from isoform.kernels import compiler

compiler.SOURCES = Path(sys.argv[1])
if sys.argv[2:] == ["kept"]:
    compiler.compile_source = None  # to call it is an error
print(compiler.cached("scale", architecture="sm_90", defines={"FACTOR": "3.0f"}))
"""


def process(folder, *how):
    """Another interpreter that wants the same kernel; ``kept``: and cannot compile it."""
    command = [sys.executable, "-c", PROCESS, str(folder), *how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_second_process_does_not_compile(folder):
    assert "'NoneType' object is not callable" in process(folder, "kept").communicate(timeout=60)[1]
    first, *later = (process(folder, *how).communicate(timeout=60)[0] for how in ((), ["kept"]))
    written = Path(first.strip())
    assert [Path(answer.strip()) for answer in later] == [written]
    assert set(compiler.cache_folder().iterdir()) == {written}


def test_processes_may_compile_the_same_at_once(folder):
    answers = [each.communicate(timeout=60)[0] for each in [process(folder) for _ in range(4)]]
    files = {Path(answer.strip()) for answer in answers}
    assert files == set(compiler.cache_folder().iterdir())
