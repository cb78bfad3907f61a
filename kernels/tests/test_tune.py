"""Geometries of a user's own: the file, and the search for them on a machine that is made up."""

import json
from dataclasses import asdict, replace

import pytest

from isoform.kernels import geometries, launch, tensor, tune
from isoform.kernels.geometries import GeometriesError, OutdatedGeometries
from isoform.kernels.tensor import GEOMETRIES, Geometry
from isoform.kernels.tune import Task, search

FORWARD = GEOMETRIES["forward"][32]
OTHER = replace(FORWARD, warps=8)
GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache directory of its own."""
    monkeypatch.delenv("ISOFORM_GEOMETRIES", raising=False)
    monkeypatch.setenv("ISOFORM_CACHE_DIR", str(tmp_path / "cache"))
    geometries._for.cache_clear()
    yield tmp_path / "cache"
    geometries._for.cache_clear()


def used(device=GPU, head_dim=32):
    with geometries.of_device(device, 99 << 10, 128, "sm_89"):
        return tensor.geometry_of("forward", head_dim, gated=False)


# --- The file -------------------------------------------------------------------------------------


def test_without_a_file_the_built_in_ones_are_used():
    assert used() == FORWARD


def test_what_is_written_is_used_on_that_device_for_that_entry_and_no_longer(cache):
    geometries.write(geometries.file(), GPU, {"forward": {32: OTHER}})
    assert geometries.file() == cache / "geometries.json"
    assert used() == OTHER
    assert used(head_dim=64) == GEOMETRIES["forward"][64]
    assert used("another GPU") == FORWARD
    assert tensor.geometry_of("forward", 32, gated=False) == FORWARD


def test_what_a_file_has_of_other_passes_and_devices_stays():
    geometries.write(geometries.file(), GPU, {"forward": {32: OTHER}})
    geometries.write(geometries.file(), GPU, {"forward": {64: OTHER}, "backward_key": {16: OTHER}})
    geometries.write(geometries.file(), "another GPU", {"forward": {32: FORWARD}})
    assert geometries.read(geometries.file()).devices == {
        GPU: {"forward": {32: OTHER, 64: OTHER}, "backward_key": {16: OTHER}},
        "another GPU": {"forward": {32: FORWARD}},
    }


def test_the_environment_names_another_file_or_none(tmp_path, monkeypatch):
    geometries.write(geometries.file(), GPU, {"forward": {32: OTHER}})
    monkeypatch.setenv("ISOFORM_GEOMETRIES", "builtin")
    assert used() == FORWARD
    there = tmp_path / "mine.json"
    monkeypatch.setenv("ISOFORM_GEOMETRIES", str(there))
    with pytest.raises(GeometriesError, match=r"mine\.json, which does not exist: make it with"):
        used()
    geometries.write(there, GPU, {"forward": {32: replace(OTHER, block=32, chunk=32)}})
    assert used().block == 32


def test_a_file_of_other_kernels_is_not_used_and_says_so(monkeypatch):
    monkeypatch.setattr(geometries, "kernels_hash", lambda: "older")
    geometries.write(geometries.file(), GPU, {"forward": {32: OTHER}})
    monkeypatch.setattr(geometries, "kernels_hash", lambda: "newer")
    with pytest.warns(OutdatedGeometries, match=r"geometries\.json was made for other kernels"):
        assert used() == FORWARD
    geometries.write(geometries.file(), GPU, {"forward": {64: OTHER}})
    assert geometries.read(geometries.file()).devices[GPU] == {"forward": {64: OTHER}}


def content(**changed):
    return {
        "schema": 1,
        "isoform": "0.1.0",
        "kernels": geometries.kernels_hash(),
        "devices": {GPU: {"forward": {"32": asdict(OTHER)}}},
    } | changed


def of_forward(**changed):
    return content(devices={GPU: {"forward": {"32": asdict(OTHER) | changed}}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        (json.dumps({"schema": 1}), "KeyError"),
        (content(schema=2), "its schema is 2, and this isoform's 1"),
        (content(devices={GPU: {"sideways": {"32": {}}}}), "no pass 'sideways' with head dim 32"),
        (content(devices={GPU: {"forward": {"33": {}}}}), "no pass 'forward' with head dim 33"),
        (content(devices={GPU: {"forward": {"32": {"warps": 4}}}}), r"fields \['warps'\], not"),
        (of_forward(warps=0), "warps is 0, not a positive integer"),
        (of_forward(warps="8"), "warps is '8', not a positive integer"),
    ],
)
def test_a_damaged_file_is_an_error_that_says_what_helps(text, message):
    there = geometries.file()
    there.parent.mkdir()
    there.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(GeometriesError, match=message) as raised:
        used()
    assert "run 'python -m isoform.kernels.tune' again, or remove it" in str(raised.value)


def test_a_pass_that_is_prepared_is_cut_as_the_file_says(monkeypatch):
    """The launch that is prepared, not just the table."""
    geometries.write(geometries.file(), GPU, {"forward": {32: OTHER}})
    loaded = []

    class Module:
        def get_function(self, kernel):
            return type("Kernel", (), {"kernel": None, "max_dynamic_shared_size_bytes": 1 << 20})

    monkeypatch.setattr(launch, "load", lambda source, defines: loaded.append(defines) or Module())
    monkeypatch.setattr(launch, "toolkit", lambda: None)
    monkeypatch.setattr(launch, "_PREPARED", {})
    monkeypatch.setattr(launch, "_device_name", lambda: GPU)
    monkeypatch.setattr(launch, "_device_traits", lambda: (99 << 10, 128, "sm_89"))
    shape = tune.CASES[0].shape
    views = {
        name: geometries_view(shape.of(name))
        for name in ("q", "k", "v", "mask", "pair_bias", "out")
    }
    launch.prepared("key", tensor.forward, lambda: (shape, "bfloat16", views), 1.0)
    assert [defines["WARPS"] for defines in loaded] == [8]


def geometries_view(shape):
    from math import prod

    from isoform.kernels.arguments import View

    return View.of(1 << 20, shape, tuple(prod(shape[axis + 1 :]) for axis in range(len(shape))))


# --- The search -----------------------------------------------------------------------------------

TASK = Task("forward", 32)


class Machine:
    """One on which a geometry takes what a formula says, and some cannot be used."""

    def __init__(self, ms, refused=lambda geometry: ""):
        self.ms, self.refused, self.timed = ms, refused, []

    def refuse(self, task, candidates):
        return [self.refused(one) for one in candidates]

    def time(self, task, candidates):
        assert not any(map(self.refused, candidates))
        self.timed += candidates
        return {one: (self.ms(one), 3 * self.ms(one)) for one in candidates}


def from_best(geometry, warps=8, block=128):
    """Twice as slow with each step away from the best."""
    steps = abs(geometry.warps.bit_length() - warps.bit_length())
    return 2.0 ** (steps + abs(geometry.block.bit_length() - block.bit_length()))


def test_the_best_is_found_over_several_steps():
    found = search(TASK, Geometry(1, 1, 1, 32, 4, 32), Machine(from_best))
    assert (found.best.warps, found.best.block) == (8, 128)
    assert found.speedup == pytest.approx(2.0**5)
    assert found.tried > 10
    assert found.left_out == {}


def test_nothing_changes_where_nothing_is_faster():
    """By a whole hundredth, that is: less is noise."""
    best = Geometry(1, 8, 1, 128, 4, 64)
    machine = Machine(lambda one: 1.0 if one == best else 0.995)
    found = search(TASK, best, machine)
    assert found.best == best
    assert found.speedup == 1.0


def test_what_cannot_be_used_is_not_timed_and_counted():
    machine = Machine(from_best, lambda one: "spills registers" if one.warps > 4 else "")
    found = search(TASK, Geometry(1, 1, 1, 32, 4, 32), machine)
    assert (found.best.warps, found.best.block) == (4, 128)
    assert found.left_out["spills registers"] >= 1


def test_a_beginning_that_cannot_be_used_is_an_error():
    machine = Machine(from_best, lambda one: "does not compile")
    with pytest.raises(RuntimeError, match=r"forward.*32.*Geometry.*does not compile"):
        search(TASK, FORWARD, machine)


def test_neighbours_differ_by_one_step_of_one_number():
    found = list(tune.neighbours(Geometry(2, 4, 1, 64, 3, 64, 1)))
    assert len(set(found)) == len(found)
    assert Geometry(2, 4, 1, 128, 3, 64, 1) in found
    assert Geometry(2, 4, 1, 64, 3, 128, 1) not in found  # a chunk is no more than a tile
    assert Geometry(2, 4, 1, 32, 3, 64, 1) not in found


def test_every_entry_of_the_table_is_a_task_with_something_to_time():
    every = tune.tasks()
    assert len(every) == sum(map(len, GEOMETRIES.values()))
    assert all(task.shapes for task in every)
    gated = Task("backward_pair_bias, gated", 16)
    assert gated in every
    assert (gated.name, gated.gated) == ("backward_pair_bias", True)
    assert not Task("forward", 16).gated
    chosen = tune.tasks(["backward_pair_bias"], [16])
    assert chosen == (Task("backward_pair_bias", 16), gated)


def test_what_does_not_fit_is_refused_before_it_is_compiled():
    assert tune.too_large(TASK, FORWARD, 99 << 10) == ""
    assert "bytes of shared memory" in tune.too_large(TASK, replace(FORWARD, block=128), 48 << 10)
    assert tune.too_large(TASK, replace(FORWARD, warps=8, rows=8), 1 << 30) == (
        "more than 1024 threads"
    )


def test_the_built_in_table_fits_the_smallest_gpus():
    for task in tune.tasks():
        assert tune.too_large(task, GEOMETRIES[task.entry][task.head_dim], 99 << 10) == ""


# --- The command line -----------------------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch):
    """A GPU on which eight warps are best."""

    class Gpu(Machine):
        name = GPU

        def __init__(self, jobs, burst):
            super().__init__(lambda one: from_best(one, block=one.block))

        def close(self):
            pass

    class Burst:
        def warm_up(self):
            pass

    pytest.importorskip("rich")
    monkeypatch.setattr(tune, "Gpu", Gpu)
    monkeypatch.setattr(tune, "CudaBurst", Burst)
    monkeypatch.setattr("isoform.kernels.benchmark.__main__.no_gpu", lambda: "")


def test_the_command_writes_what_the_package_then_uses(made_up, capsys):
    assert tune.main(["--pass", "forward", "--head-dim", "32"]) == 0
    assert used().warps == 8
    shown = capsys.readouterr().out
    assert "warps=8" in shown
    assert "Geometries for NVIDIA H100" in shown


def test_json_for_scripts(made_up, capsys, tmp_path):
    there = tmp_path / "mine.json"
    asked = ["--pass", "forward", "--head-dim", "32", "--json", "--output", str(there)]
    assert tune.main(asked) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["device"] == GPU
    assert said["file"] == str(there)
    assert said["found"][0]["best"]["warps"] == 8
    assert geometries.read(there).devices[GPU]["forward"][32].warps == 8


def test_a_dry_run_writes_nothing(made_up, capsys, cache):
    assert tune.main(["--pass", "forward", "--head-dim", "32", "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not (cache / "geometries.json").exists()


def test_there_is_a_message_where_nothing_can_be_tuned(monkeypatch, capsys):
    monkeypatch.setattr("isoform.kernels.benchmark.__main__.no_gpu", lambda: "no GPU here")
    assert tune.main([]) == 3
    assert capsys.readouterr().err == "no GPU here\n"
    monkeypatch.setenv("ISOFORM_GEOMETRIES", "builtin")
    with pytest.raises(SystemExit, match="2"):
        tune.main([])
