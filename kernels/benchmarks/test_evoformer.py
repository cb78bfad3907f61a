"""How long Evoformer attention takes on this GPU, ours and others', as benchmarks of pytest's.

All competitors of a case are timed in turns, by CUDA events, when the first of them is asked for
(`isoform.kernels.benchmark`). What was measured is then told to pytest-benchmark, which draws its
tables, keeps and compares (`--benchmark-save`, `--benchmark-compare`, `--benchmark-json`). A
competitor that cannot do the case is a skip with its reason. `test_bars` says whether ours are as
fast as they have to be.
"""

import pytest

from isoform.kernels.benchmark import records
from isoform.kernels.benchmark.bars import bars
from isoform.kernels.benchmark.cases import CASES, DTYPES
from isoform.kernels.benchmark.competitors import COMPETITORS, Settings
from isoform.kernels.benchmark.run import run

# PyTorch's compiler warns of itself, and of the GPU that it is on.
pytestmark = pytest.mark.filterwarnings("default")


def pytest_generate_tests(metafunc):
    """Every case in every dtype asked for, for every competitor."""
    if "case" in metafunc.fixturenames:
        dtypes = metafunc.config.getoption("dtype") or DTYPES[:1]
        metafunc.parametrize("dtype", dtypes, scope="module")
        metafunc.parametrize("case", CASES, ids=lambda case: case.name, scope="module")
    if "competitor" in metafunc.fixturenames:
        metafunc.parametrize("competitor", COMPETITORS, ids=lambda one: one.name)


class Clock:
    """A clock that stands still but for what was measured: pytest-benchmark reads it before and
    after each call.
    """

    def __init__(self):
        self.now_s = 0.0

    def read(self):
        return self.now_s

    def pass_ms(self, ms):
        self.now_s += ms / 1e3


CLOCK = Clock()


@pytest.fixture(scope="session")
def around(pytestconfig):
    return records.surroundings(pytestconfig.getoption("commit"))


@pytest.fixture(scope="module")
def measured(case, dtype, around, pytestconfig):
    """By competitor, its record for this case, and the times that it is made of."""
    samples = {}
    found = run(
        *(case, dtype, COMPETITORS, around),
        settings=Settings(flex_mode=pytestconfig.getoption("flex_mode")),
        rounds=pytestconfig.getoption("rounds"),
        say=lambda said: None,
        keep=samples,
    )
    if path := pytestconfig.getoption("record"):
        records.append(path, found)
    return dict(zip((one.name for one in COMPETITORS), found, strict=True)), samples


@pytest.mark.parametrize("step", [0, 1], ids=["forward", "backward"])
@pytest.mark.benchmark(timer=CLOCK.read, disable_gc=False, warmup=False)
def test_time(benchmark, measured, case, dtype, step, competitor):
    found, samples = measured
    record = found[competitor.name]
    if record.not_run:
        pytest.skip(f"not run: {record.not_run}")
    benchmark.group = f"{case.name} {dtype} {'backward' if step else 'forward'}"
    times = samples[competitor.name].gpu_ms[step]
    left = iter(times)
    benchmark.pedantic(lambda: CLOCK.pass_ms(next(left)), rounds=len(times))
    host = record.backward_host_us if step else record.forward_host_us
    floor = record.backward_floor if step else record.forward_floor
    benchmark.extra_info |= {
        "host_us": host.median,
        "floor_ms": floor.ms if floor else None,
        "peak_bytes": record.peak_bytes,
        "memory_bytes": record.memory_bytes,
    }


def test_bars(measured, case, dtype):
    held = bars(measured[0].values())
    assert held
    assert not [str(bar) for bar in held if not bar.met]
