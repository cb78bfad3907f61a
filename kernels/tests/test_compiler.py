"""The way from source to machine code, without NVRTC and without a GPU: stand-ins play both.

What needs the real compiler is in ``test_compile_gate.py``.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from isoform.kernels import compiler
from isoform.kernels.compiler import CompileError, CompilerUnavailable, Resources, Toolkit

KERNEL = '#include "inner.cuh"\n#include <cuda_bf16.h>\nextern "C" __global__ void kernel() {}\n'


class FakeError(Exception):
    pass


class FakeNVRTC:
    """A compiler whose machine code is what it was given, and that counts."""

    NVRTCError = FakeError

    def __init__(self, fails=False):
        self.compiled = 0
        self.alive = 0
        self.fails = fails

    def createProgram(self, source, name, headers, names):  # noqa: N802
        self.alive += 1
        return {"given": [source, name, headers, names]}

    def compileProgram(self, program, options):  # noqa: N802
        self.compiled += 1
        program["given"].append(options)
        if self.fails:
            raise FakeError("NVRTC_ERROR_COMPILATION (6)")

    def getCUBIN(self, program):  # noqa: N802
        return b"\x7fELF" + repr(program["given"]).encode()

    def getProgramLog(self, program):  # noqa: N802
        return "kernel.cu(3): error: expected a declaration\n" if self.fails else "\n"

    def destroyProgram(self, program):  # noqa: N802
        self.alive -= 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of kernel sources."""
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "kernel.cu").write_text(KERNEL)
    (folder / "inner.cuh").write_text('  #  include "innermost.cuh"\n// once\n')
    (folder / "innermost.cuh").write_text('#pragma once\n#include "inner.cuh"\n')
    (folder / "other.cuh").write_text("// not included\n")
    monkeypatch.setattr(compiler, "SOURCES", folder)
    return folder


@pytest.fixture
def nvrtc(folder, tmp_path, monkeypatch):
    """A stand-in for the compiler, with a cache of its own."""
    fake = FakeNVRTC()
    use(monkeypatch, fake)
    monkeypatch.setenv("ISOFORM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ISOFORM_LINEINFO", raising=False)
    return fake


def use(monkeypatch, nvrtc, version=(13, 0), headers=(13, 0)):
    known = Toolkit(nvrtc, version, (75, 80, 90, 100), ("/include",), headers)
    monkeypatch.setattr(compiler, "toolkit", lambda: known)


# --- Sources and options --------------------------------------------------------------------------


def test_sources_are_the_file_and_the_headers_that_it_reaches(folder):
    texts = compiler.sources("kernel")
    assert set(texts) == {"kernel.cu", "inner.cuh", "innermost.cuh"}
    assert texts["kernel.cu"] == KERNEL


def test_a_source_that_is_missing_is_named_with_those_that_are_there(folder):
    with pytest.raises(FileNotFoundError, match=r"no kernel source lost\.cu in .*: kernel$"):
        compiler.sources("lost")


def test_options(monkeypatch):
    monkeypatch.delenv("ISOFORM_LINEINFO", raising=False)
    told = compiler.options("sm_90", {"HEAD_DIM": 64, "ELEMENT": 1})
    assert told[0] == "--gpu-architecture=sm_90"
    assert told[-2:] == ("--define-macro=ELEMENT=1", "--define-macro=HEAD_DIM=64")
    assert not [option for option in told if "fast" in option or "line" in option]
    monkeypatch.setenv("ISOFORM_LINEINFO", "1")
    assert "--generate-line-info" in compiler.options("sm_90")


def test_what_is_compiled_is_what_was_read(nvrtc):
    made = compiler.compile_source("kernel", architecture="sm_90", defines={"N": 3})
    assert (made.name, made.architecture, made.defines) == ("kernel", "sm_90", {"N": 3})
    assert KERNEL.encode("unicode_escape") in made.cubin
    assert b"[b'inner.cuh', b'innermost.cuh']" in made.cubin
    assert b"--include-path=/include" in made.cubin
    assert nvrtc.alive == 0


def test_a_source_that_does_not_compile_shows_the_compilers_words(nvrtc):
    nvrtc.fails = True
    with pytest.raises(
        CompileError, match=r"kernel\.cu \(sm_80 N=3\)(.|\n)*kernel\.cu\(3\): error"
    ):
        compiler.compile_source("kernel", architecture="sm_80", defines={"N": 3})
    assert nvrtc.alive == 0


@pytest.mark.parametrize("wrong", ["90", "sm90", "compute_90", "sm_90x", "sm_9", ""])
def test_architectures_have_a_form(nvrtc, wrong):
    with pytest.raises(ValueError, match="must be like 'sm_90'"):
        compiler.compile_source("kernel", architecture=wrong)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("sm_61", r"sm_61 is too old: the kernels need sm_70"),
        ("sm_70", r"CUDA 13\.0 does not compile for sm_70: .* install isoform\[cuda12\]"),
        ("sm_130a", r"CUDA 13\.0 does not compile for sm_130a: upgrade the NVRTC wheel"),
    ],
)
def test_architectures_out_of_reach_say_what_helps(nvrtc, architecture, message):
    with pytest.raises(CompilerUnavailable, match=message):
        compiler.compile_source("kernel", architecture=architecture)


# --- The disk cache -------------------------------------------------------------------------------


def cached(**defines):
    return compiler.cached("kernel", architecture="sm_90", defines=defines)


def test_the_second_time_nothing_is_compiled(nvrtc, tmp_path):
    first = cached(N=3)
    assert first.read_bytes().startswith(b"\x7fELF")
    assert first.is_relative_to(tmp_path / "cache")
    assert cached(N=3) == first
    assert nvrtc.compiled == 1
    assert list(first.parent.iterdir()) == [first]  # nothing unfinished stays


@pytest.mark.parametrize("change", ["source", "header", "define", "lines", "compiler", "headers"])
def test_whatever_the_compiler_reads_is_in_the_key(nvrtc, folder, monkeypatch, change):
    first = cached(N=3)
    match change:
        case "source":
            (folder / "kernel.cu").write_text(KERNEL + "\n")
        case "header":
            (folder / "innermost.cuh").write_text("#pragma once\n")
        case "lines":
            monkeypatch.setenv("ISOFORM_LINEINFO", "1")
        case "compiler":
            use(monkeypatch, nvrtc, version=(13, 1))
        case "headers":
            use(monkeypatch, nvrtc, headers=(13, 1))
    second = cached(N=4 if change == "define" else 3)
    assert second.name.split(".")[2] != first.name.split(".")[2]
    assert nvrtc.compiled == 2


def test_the_architecture_is_in_the_key(nvrtc):
    cached()
    compiler.cached("kernel", architecture="sm_80")
    assert nvrtc.compiled == 2


def test_headers_that_are_not_included_are_not_in_the_key(nvrtc, folder):
    first = cached()
    (folder / "other.cuh").write_text("// changed\n")
    assert cached() == first


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None])
def test_a_damaged_entry_is_made_anew(nvrtc, damage):
    first = cached()
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + b"!" if damage is None else damage)
    assert cached().read_bytes() == whole
    assert nvrtc.compiled == 2


def test_many_at_once_each_get_it_whole(nvrtc):
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: cached().read_bytes(), range(32)))
    assert len(set(files)) == 1
    assert len(list(compiler.cache_folder().iterdir())) == 1


def test_the_least_recently_used_go(nvrtc, monkeypatch):
    old, used, *_ = made = [cached(N=n) for n in range(3)]
    for age, file in enumerate(made):
        os.utime(file, (age, age))
    os.utime(used, (0, 0))  # older still, but for the hit that follows
    cached(N=1)
    monkeypatch.setattr(compiler, "CACHE_BYTES", 3 * old.stat().st_size)
    cached(N=3)
    left = set(compiler.cache_folder().iterdir())
    assert len(left) == 3
    assert used in left
    assert old not in left


def test_a_cache_that_cannot_be_written_says_so(nvrtc, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ISOFORM_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(CompilerUnavailable, match="set ISOFORM_CACHE_DIR to a folder"):
        cached()


@pytest.mark.skipif(sys.platform == "win32", reason="the folder is another")
def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("ISOFORM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / ".cache" / "isoform" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiler.cache_folder() == tmp_path / "xdg" / "isoform" / "kernels"


# --- Loading --------------------------------------------------------------------------------------


class FakeDriverError(Exception):
    pass


class FakeRuntime(SimpleNamespace):
    CUDARuntimeError = FakeError


@pytest.fixture
def cupy(nvrtc, monkeypatch):
    """A stand-in for CuPy with two GPUs; ``cupy.refuse`` is the driver's answer, if not None."""
    fake = SimpleNamespace(__version__="14.2.0", device=0, loaded=[], refuse=None)

    class RawModule:
        def __init__(self, *, path):
            self.path = path

        def compile(self):
            if fake.refuse:
                raise FakeDriverError(fake.refuse)
            fake.loaded.append(self.path)

    def device(number):
        return SimpleNamespace(compute_capability=("90", "80")[number])

    runtime = FakeRuntime(
        is_hip=False,
        getDevice=lambda: fake.device,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13020,
    )
    fake.RawModule = RawModule
    fake.cuda = SimpleNamespace(
        Device=device, runtime=runtime, driver=SimpleNamespace(CUDADriverError=FakeDriverError)
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(compiler, "_LOADED", {})
    return fake


def test_a_module_is_loaded_once_for_each_device(cupy, nvrtc):
    first = compiler.load("kernel", defines={"N": 1})
    assert compiler.load("kernel", defines={"N": 1}) is first
    assert compiler.load("kernel", defines={"N": 2}) is not first
    assert nvrtc.compiled == 2

    cupy.device = 1
    other = compiler.load("kernel", defines={"N": 1})
    assert other is not first
    assert [re.search(r"sm_\d+", path)[0] for path in cupy.loaded] == ["sm_90", "sm_90", "sm_80"]


def test_a_driver_that_refuses_the_code_is_named_with_the_compiler(cupy):
    cupy.refuse = "CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"
    message = r"driver, of CUDA 13\.0, refuses machine code made by NVRTC of CUDA 13\.0"
    with pytest.raises(CompilerUnavailable, match=message):
        compiler.load("kernel")
    cupy.refuse = "CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    with pytest.raises(FakeDriverError, match="out of memory"):
        compiler.load("kernel")
    cupy.refuse = None
    assert compiler.load("kernel") is not None


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (0, r"there is no NVIDIA driver on this machine"),
        (
            12040,
            r"driver is of CUDA 12\.4 and this CuPy of CUDA 13\.2: .* install isoform\[cuda12\]",
        ),
        (13000, r"no GPU can be used \(no device\): see whether CUDA_VISIBLE_DEVICES"),
    ],
)
def test_no_device_says_why_and_what_helps(cupy, driver, message):
    def refuse():
        raise FakeError("no device")

    cupy.cuda.runtime.getDevice = refuse
    cupy.cuda.runtime.driverGetVersion = lambda: driver
    with pytest.raises(CompilerUnavailable, match=message):
        compiler.load("kernel")


# --- A machine where something is missing ---------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Stand-ins for CuPy and the pathfinder; returns the headers' folder and the two modules."""
    include = tmp_path / "include"
    include.mkdir()
    (include / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  13000\n")
    nvrtc = SimpleNamespace(getVersion=lambda: (13, 0), getSupportedArchs=lambda: (75, 80, 90))
    runtime = SimpleNamespace(is_hip=False)
    cuda = SimpleNamespace(runtime=runtime, nvrtc=nvrtc)
    pathfinder = SimpleNamespace(find_nvidia_header_directory=lambda part: str(include))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(__version__="14.2.0", cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(pathfinder=pathfinder))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    compiler.toolkit.cache_clear()
    yield SimpleNamespace(include=include, cuda=cuda, pathfinder=pathfinder)
    compiler.toolkit.cache_clear()


def test_the_toolkit_is_what_the_machine_has(machine):
    known = compiler.toolkit()
    assert known.version == known.headers == (13, 0)
    assert known.architectures == (75, 80, 90)
    assert known.include == (str(machine.include),)


def test_without_cupy(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(CompilerUnavailable, match=r"CuPy cannot be imported.*isoform\[cuda13\]"):
        compiler.toolkit()


def test_a_cupy_from_before_the_pathfinder(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(CompilerUnavailable, match=r"CuPy 14\.2\.0 is too old"):
        compiler.toolkit()


def test_a_cupy_for_other_gpus(machine):
    machine.cuda.runtime.is_hip = True
    with pytest.raises(CompilerUnavailable, match="built for ROCm"):
        compiler.toolkit()


def test_without_nvrtc(machine):
    def missing():
        raise RuntimeError("Failure finding libnvrtc.so.13\nsearched here\nand there")

    machine.cuda.nvrtc.getVersion = missing
    message = r"NVRTC, .* missing \(Failure finding libnvrtc\.so\.13\): install isoform\[cuda13\]"
    with pytest.raises(CompilerUnavailable, match=message):
        compiler.toolkit()


def test_without_headers(machine):
    machine.pathfinder.find_nvidia_header_directory = {"cudart": "/include"}.get
    with pytest.raises(CompilerUnavailable, match=r"headers of cccl are missing.*CUDA_PATH"):
        compiler.toolkit()


def test_headers_of_another_cuda(machine):
    (machine.include / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  12080\n")
    with pytest.raises(CompilerUnavailable, match=r"of CUDA 13\.0, and the headers .*CUDA 12\.8"):
        compiler.toolkit()


def test_nothing_is_imported_before_it_is_needed():
    program = (
        "import sys, isoform.kernels.compiler; sys.exit(bool({'cupy', 'cuda'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


# --- The assembler's report -----------------------------------------------------------------------

# Word for word from NVRTC 13.0, for three kernels and one function that was not inlined.
LOG = """\
ptxas warning : Value of threads per SM for entry spills is out of range. .minnctapersm will be ignored
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z2tmILi3EEvPf' for 'sm_80'
ptxas info    : Function properties for _Z2tmILi3EEvPf
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 1.163 ms
ptxas info    : Compiling entry function 'calls' for 'sm_80'
ptxas info    : Function properties for calls
ptxas         .     80 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 21 registers, used 1 barriers, 80 bytes cumulative stack size, 256 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 3.263 ms
ptxas info    : Function properties for _Z6helperfi
ptxas         .     0 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Compiling entry function 'spills' for 'sm_80'
ptxas info    : Function properties for spills
ptxas         .     1128 bytes stack frame, 1528 bytes spill stores, 1552 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1128 bytes cumulative stack size, 360 bytes cmem[0]
ptxas info    : Compile time = 16.325 ms
 """  # noqa: E501

# From NVRTC 12.8.
OLDER_LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for f
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 512 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 1.419 ms
 """


def test_resources_are_read_for_each_kernel():
    assert compiler.resources(LOG) == {
        "_Z2tmILi3EEvPf": Resources(registers=8),
        "calls": Resources(registers=21, shared_bytes=256, stack_bytes=80),
        "_Z6helperfi": Resources(spill_stores=16, spill_loads=24),
        "spills": Resources(32, spill_stores=1528, spill_loads=1552, stack_bytes=1128),
    }
    assert compiler.resources(OLDER_LOG) == {"f": Resources(registers=10, shared_bytes=512)}
    assert compiler.resources("") == {}


def test_warnings_are_found():
    assert [line[:15] for line in compiler.warnings(LOG)] == ["ptxas warning :"]
    assert compiler.warnings('k.cu(2): warning #177-D: variable "a" was declared\n')
    assert compiler.warnings(OLDER_LOG) == []
