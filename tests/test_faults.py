"""Faults injected into real commands: what was interrupted ends as if nothing had been, what is damaged is not used.

A part runs in every `make test`; `make test-faults` runs all of it, with more points to be killed at.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from .children import (
    AtStep,
    CountLines,
    FullDisk,
    KillAtLine,
    finish,
    jumping_clock,
    killed_after_the_summary,
    start,
    without_privileges,
)
from .miniature import tiny_overrides, write_cub

DELTA = ["reg=delta", "reg.attention.method=taylor", "reg.attention.images=4", "reg.attention.head_epochs=1"]
METHODS = {"learned": [*DELTA, "reg.name=learned", "average=ema"]}  # tests/learned.py
if os.environ.get("DELTA_FAULTS"):
    METHODS |= {"delta": DELTA, "afa": ["reg=afa"]}
LONG = pytest.mark.faults  # only in make test-faults
KILLS = 20 if os.environ.get("DELTA_FAULTS") else 3


@pytest.fixture(scope="module")
def cub_root(tmp_path_factory) -> Path:
    return write_cub(tmp_path_factory.mktemp("data") / "CUB_200_2011")


def command(root: Path, results: Path, *more: str) -> list[str]:
    """Eight iterations with a line of metrics every three, and a checkpoint after each iteration."""
    tiny = [word for word in tiny_overrides(root, results) if not word.startswith("schedule.")]
    schedule = ["schedule.iterations=8", "schedule.batch_size=4", "schedule.log_every=3"]
    return [*tiny, *schedule, "schedule.checkpoint_seconds=0.000001", *more]


def only_run(results: Path) -> Path:
    (run,) = (results / "runs").iterdir()
    return run


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def assert_the_same(run: Path, expected: Path) -> None:
    """Bit for bit: metrics, weights, attention, predictions; and nothing lies about."""
    assert metrics(run) == metrics(expected)
    for name in [f"{name}.safetensors" for name in ("model", "attention", "method", "stage1")]:
        assert (run / name).exists() == (expected / name).exists()
        if (run / name).exists():
            found, right = load_file(run / name), load_file(expected / name)
            assert found.keys() == right.keys() and all(torch.equal(found[key], right[key]) for key in right)
    with np.load(run / "predictions.npz") as found, np.load(expected / "predictions.npz") as right:
        assert all((found[key] == right[key]).all() for key in right)
    summary, right = (json.loads((path / "summary.json").read_text()) for path in (run, expected))
    assert summary["error"] is None and summary["test_top1"] == right["test_top1"]
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in expected.iterdir())


@pytest.fixture(scope="module", params=METHODS)
def undisturbed(request, cub_root, tmp_path_factory) -> tuple[list[str], Path, int]:
    """The method's overrides, its run, and how many lines of our code that took."""
    method, folder = METHODS[request.param], tmp_path_factory.mktemp("undisturbed")
    counted = CountLines(file=folder / "lines")
    status, output = finish(command(cub_root, folder / "results", *method), counted)
    assert status == 0, output
    return method, only_run(folder / "results"), int((folder / "lines").read_text())


# --- killed ---


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_at_a_random_point_it_ends_the_same(kill, undisturbed, cub_root, tmp_path):
    method, expected, lines = undisturbed
    arguments = command(cub_root, tmp_path / "results", *method)
    # One point in each stretch of the run: reading data, decoding, attention, training, writing.
    point = random.Random(kill).randrange(lines * kill // KILLS, lines * (kill + 1) // KILLS)
    status, output = finish(arguments, KillAtLine(point))
    assert status == -signal.SIGKILL, output
    status, output = finish(arguments)
    assert status == 0, output
    assert_the_same(only_run(tmp_path / "results"), expected)


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (signal.SIGTERM, 2),  # between two lines of metrics
        (signal.SIGINT, 3),  # with one
        *(pytest.param(*case, marks=LONG) for case in [(signal.SIGINT, 1), (signal.SIGTERM, 6), (signal.SIGINT, 7)]),
    ],
)
def test_asked_to_end_it_saves_its_state_and_ends_the_same(number, step, undisturbed, cub_root, tmp_path):
    method, expected, _ = undisturbed
    arguments = command(cub_root, tmp_path / "results", *method, "schedule.checkpoint_seconds=1000")
    status, output = finish(arguments, AtStep(step, number))
    assert status == 128 + number
    assert f"stopped by {number.name}: the same command goes on where it was" in output and "Traceback" not in output
    status, output = finish(arguments)
    assert status == 0 and f"resuming after iteration {step}" in output
    assert_the_same(only_run(tmp_path / "results"), expected)


@pytest.fixture(scope="module")
def undisturbed_afa(cub_root, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("undisturbed_afa")
    assert finish(command(cub_root, results, "reg=afa"))[0] == 0
    return only_run(results)


@pytest.mark.parametrize("step", [8, *(pytest.param(step, marks=LONG) for step in (3, 13))])
def test_asked_to_end_in_either_stage_it_ends_the_same(step, undisturbed_afa, cub_root, tmp_path):
    """AFA has two stages of eight iterations; the end of the first is the beginning of the second."""
    arguments = command(cub_root, tmp_path / "results", "reg=afa", "schedule.checkpoint_seconds=1000")
    assert finish(arguments, AtStep(step, signal.SIGTERM))[0] == 128 + signal.SIGTERM
    status, output = finish(arguments)
    assert status == 0 and f"resuming after iteration {step}" in output
    assert_the_same(only_run(tmp_path / "results"), undisturbed_afa)


@LONG
def test_killed_again_and_again_it_ends_the_same(undisturbed, cub_root, tmp_path):
    method, expected, lines = undisturbed
    arguments = command(cub_root, tmp_path / "results", *method)
    points = random.Random(1)
    for _ in range(8):
        status, output = finish(arguments, KillAtLine(points.randrange(lines // 3, lines)))
        if status == 0:  # it got further than that from where it was
            break
    status, output = finish(arguments)
    assert status == 0, output
    assert_the_same(only_run(tmp_path / "results"), expected)


# --- the disk ---


@pytest.mark.parametrize("size", [300_000, *(pytest.param(n, marks=LONG) for n in (100, 3_000, 20_000, 100_000))])
def test_on_a_full_disk_it_names_the_file_and_goes_on_when_there_is_room(size, undisturbed, cub_root, tmp_path):
    method, expected, _ = undisturbed
    arguments = command(cub_root, tmp_path / "results", *method)
    status, output = finish(arguments, FullDisk(size))
    assert status == 1 and "Traceback" not in output
    assert output.splitlines()[-1].endswith(": File too large"), output
    status, output = finish(arguments)
    assert status == 0, output
    assert_the_same(only_run(tmp_path / "results"), expected)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of `size` bytes."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def mount(size: int, *options: str) -> Path:
        option = ",".join([f"size={size}", *options])
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(mounted)], capture_output=True)
        if made.returncode:
            pytest.skip("only root may mount; test_on_a_full_disk needs no root")
        return mounted

    yield mount
    subprocess.run(["umount", str(mounted)], capture_output=True)


@pytest.mark.parametrize("blocks", [40, *(pytest.param(n, marks=LONG) for n in (8, 100, 200))])
def test_on_a_small_file_system_too(blocks, undisturbed, cub_root, tmp_path, small_disk):
    """A file system that is neither the cache's nor that of temporary files."""
    method, expected, _ = undisturbed
    disk = small_disk(blocks * 4096)
    arguments = command(cub_root, disk / "results", f"cache_dir={tmp_path / 'cache'}", *method)
    status, output = finish(arguments)
    assert status == 1 and "No space left on device" in output and "Traceback" not in output, output
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    status, output = finish(arguments)
    assert status == 0, output
    assert_the_same(only_run(disk / "results"), expected)


def test_results_may_lie_on_another_file_system_than_cache_and_temporary_files(undisturbed, cub_root, tmp_path):
    method, expected, _ = undisturbed
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        arguments = command(cub_root, Path(folder) / "results", f"cache_dir={tmp_path / 'cache'}", *method)
        status, output = finish(arguments)
        assert status == 0, output
        assert_the_same(only_run(Path(folder) / "results"), expected)


def test_a_results_folder_that_cannot_be_written_is_named(cub_root, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    results.chmod(0o555)
    status, output = finish(command(cub_root, results, "reg=l2"), without_privileges)
    assert status == 1 and "Traceback" not in output
    assert f"error: {results}" in output and "Errno" not in output


def test_what_is_finished_is_skipped_on_a_disk_that_cannot_be_written(cub_root, tmp_path):
    arguments = command(cub_root, tmp_path / "results", "reg=l2")
    assert finish(arguments)[0] == 0
    folders = [tmp_path / "results", *(path for path in (tmp_path / "results").rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    status, output = finish(arguments, without_privileges)
    assert status == 0 and "done, skipped" in output


# --- data ---


def test_an_image_that_may_not_be_read_is_named(tmp_path):
    root = write_cub(tmp_path / "CUB")
    forbidden = sorted((root / "images").glob("*/*.jpg"))[3]
    forbidden.chmod(0)
    arguments = command(root, tmp_path / "results", "reg=l2")
    status, output = finish(arguments, without_privileges)
    assert status == 1 and "Traceback" not in output
    assert "dataset.unreadable=skip" in output and forbidden.name in output and "Permission denied" in output
    forbidden.chmod(0o644)
    assert finish(arguments, without_privileges)[0] == 0  # nothing has to be cleared away first


def test_a_damaged_image_among_good_ones_is_named_and_mended(tmp_path):
    root = write_cub(tmp_path / "CUB")
    broken = sorted((root / "images").glob("*/*.jpg"))[5]
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    arguments = command(root, tmp_path / "results", "reg=l2")
    status, output = finish(arguments)
    assert status == 1 and "dataset.unreadable=skip" in output and broken.name in output
    assert not list((tmp_path / "results").glob("runs/*"))
    broken.write_bytes(whole)
    assert finish(arguments)[0] == 0


def test_images_deleted_while_it_trains_change_nothing(undisturbed, cub_root, tmp_path):
    method, expected, _ = undisturbed
    root = tmp_path / "CUB"
    shutil.copytree(cub_root, root)
    child = start(command(root, tmp_path / "results", *method), AtStep(4, until=tmp_path / "go on"))
    child.wait_for("iteration 3/")
    shutil.rmtree(root)
    (tmp_path / "go on").touch()
    assert child.wait() == 0, child.text()
    assert_the_same(only_run(tmp_path / "results"), expected)


def test_an_image_replaced_by_one_of_the_same_size_makes_another_data_set(tmp_path):
    root = write_cub(tmp_path / "CUB")
    image = sorted((root / "images").glob("*/*.jpg"))[5]
    Image.new("RGB", (20, 20), "red").save(image, "bmp")  # not compressed: all of one size
    arguments = command(root, tmp_path / "results", "reg=l2")
    assert finish(arguments)[0] == 0
    size = image.stat().st_size
    Image.new("RGB", (20, 20), "green").save(image, "bmp")
    assert image.stat().st_size == size
    status, output = finish(arguments)
    assert status == 0 and f"cub: 1 images changed ({image.name})" in output
    fingerprints = {
        json.loads(path.read_text())["dataset_fingerprint"] for path in tmp_path.glob("results/runs/*/s*.json")
    }
    assert len(fingerprints) == 2
    image.touch()  # looked at again, and found to be the same
    status, output = finish(arguments)
    assert status == 0 and "done, skipped" in output and "images changed" not in output


# --- damaged artefacts ---


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_killed_right_after_its_summary_it_leaves_nothing_when_the_next_command_has_seen_it(cub_root, tmp_path):
    arguments = command(cub_root, tmp_path / "results", "reg=l2")
    assert finish(arguments, killed_after_the_summary)[0] == -signal.SIGKILL
    run = only_run(tmp_path / "results")
    left, summary = {path.name for path in run.iterdir()}, (run / "summary.json").read_bytes()
    assert {"last.pt", ".lock", "summary.json"} <= left
    assert finish(arguments)[0] == 0
    assert {path.name for path in run.iterdir()} == left - {"last.pt", ".lock"}
    assert (run / "summary.json").read_bytes() == summary


@pytest.mark.parametrize("damage", [flip_a_bit, pytest.param(cut_off, marks=LONG)])
def test_a_damaged_checkpoint_is_named_and_not_used(damage, undisturbed, cub_root, tmp_path):
    method, expected, _ = undisturbed
    arguments = command(cub_root, tmp_path / "results", *method)
    assert finish(arguments, AtStep(5, signal.SIGTERM))[0] == 128 + signal.SIGTERM
    checkpoint = only_run(tmp_path / "results") / "last.pt"
    damage(checkpoint)
    status, output = finish(arguments)
    assert status == 0 and f"{checkpoint} cannot be used (its checksum is wrong): the run starts again" in output
    assert_the_same(only_run(tmp_path / "results"), expected)


@pytest.mark.parametrize("damage", [cut_off, pytest.param(flip_a_bit, marks=LONG)])
def test_damaged_attention_is_named_and_computed_again(damage, cub_root, tmp_path):
    arguments = command(cub_root, tmp_path / "results", *DELTA)
    assert finish(arguments)[0] == 0
    (attention,) = (tmp_path / "results" / "cache" / "fitted").glob("*.safetensors")
    whole = {name: values.clone() for name, values in load_file(attention).items()}  # not a map of the file
    damage(attention)
    status, output = finish([*arguments, "reg.alpha=0.5"])
    assert status == 0 and f"{attention} is damaged" in output and "computing attention" in output
    assert all(torch.equal(values, whole[name]) for name, values in load_file(attention).items())


def test_a_damaged_store_is_named_and_built_again(undisturbed, cub_root, tmp_path):
    method, expected, _ = undisturbed
    arguments = command(cub_root, tmp_path / "results", *method)
    assert finish(arguments, AtStep(5, signal.SIGTERM))[0] == 128 + signal.SIGTERM
    (pixels,) = (tmp_path / "results" / "cache" / "stores").glob("*/pixels")
    flip_a_bit(pixels)
    status, output = finish(arguments)
    assert status == 0 and "is damaged (checksums are wrong: 00" in output and "it is built again" in output
    assert_the_same(only_run(tmp_path / "results"), expected)


def test_metrics_that_were_lost_or_doubled_are_restored_with_the_checkpoint(undisturbed, cub_root, tmp_path):
    method, expected, _ = undisturbed
    arguments = command(cub_root, tmp_path / "stopped", *method)
    assert finish(arguments, AtStep(5, signal.SIGTERM))[0] == 128 + signal.SIGTERM
    for name, change in (("lost", lambda text: ""), ("doubled", lambda text: text + text + '{"st')):
        shutil.copytree(tmp_path / "stopped", tmp_path / name)
        file = only_run(tmp_path / name) / "metrics.jsonl"
        file.write_text(change(file.read_text()))
        assert finish(command(cub_root, tmp_path / name, *method))[0] == 0
        assert_the_same(only_run(tmp_path / name), expected)


# --- clocks and other processes ---


def test_a_clock_that_jumps_changes_nothing(undisturbed, cub_root, tmp_path):
    method, expected, _ = undisturbed
    status, output = finish(command(cub_root, tmp_path / "results", *method), jumping_clock)
    assert status == 0, output
    assert_the_same(only_run(tmp_path / "results"), expected)
    summary = json.loads((only_run(tmp_path / "results") / "summary.json").read_text())
    assert abs(summary["train_seconds"]) < 1e7  # no jump is in it


def test_a_second_process_on_one_run_is_told_who_has_it(undisturbed, cub_root, tmp_path):
    method, expected, _ = undisturbed
    arguments = command(cub_root, tmp_path / "results", *method)
    first = start(arguments, AtStep(4, until=tmp_path / "go on"))
    first.wait_for("iteration 3/")
    status, output = finish(arguments)
    (tmp_path / "go on").touch()
    assert status == 1 and f": process {first.process.pid} on " in output and "Traceback" not in output
    assert first.wait() == 0, first.text()
    assert_the_same(only_run(tmp_path / "results"), expected)


def test_two_shells_share_a_sweep(cub_root, tmp_path):
    arguments = ["-m", *command(cub_root, tmp_path / "results", "reg=l2", "seed=range(4)")]
    first = start(arguments, AtStep(4, until=tmp_path / "go on"))
    first.wait_for("iteration 3/")
    second = start(arguments)
    second.wait_for("-s1-")  # the first run is in progress
    (tmp_path / "go on").touch()
    shells = [first, second]
    assert [shell.wait() for shell in shells] == [0, 0], [shell.text() for shell in shells]
    runs = list((tmp_path / "results" / "runs").iterdir())
    assert len(runs) == 4
    for run in runs:
        assert [line["step"] for line in metrics(run)] == [3, 6, 8]
        assert json.loads((run / "summary.json").read_text())["error"] is None
        made_by = [shell for shell in shells if f"{run.name}: iteration 8/8" in shell.text()]
        assert len(made_by) == 1
    assert "in progress" in second.text()
    assert "in progress" in first.text() or "skipped" in first.text()


@LONG
def test_a_process_that_was_suspended_too_long_stops_where_another_took_over(cub_root, tmp_path):
    arguments = command(cub_root, tmp_path / "results", "reg=l2")
    first = start(arguments, AtStep(4, until=tmp_path / "go on"))
    first.wait_for("iteration 3/")
    first.kill(signal.SIGSTOP)
    lock = only_run(tmp_path / "results") / ".lock"
    lock.write_text(lock.read_text().replace("host=", "host=not-"))  # as another machine sees it
    status, output = finish(arguments)
    assert status == 0, output
    summary = (only_run(tmp_path / "results") / "summary.json").read_bytes()
    (tmp_path / "go on").touch()
    first.kill(signal.SIGCONT)
    assert first.wait() == 1 and "was taken over by" in first.text(), first.text()
    assert (only_run(tmp_path / "results") / "summary.json").read_bytes() == summary


@pytest.mark.slow  # signals to one process are tried above, workers in test_launchers.py
def test_ctrl_c_stops_a_parallel_sweep_after_saving(cub_root, tmp_path, monkeypatch):
    """The terminal sends it to the command and to its workers. Real processes: workers import this package anew."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = ["reg=l2", "schedule.iterations=3000", "schedule.log_every=10", "schedule.checkpoint_seconds=1000"]
    tiny = [word for word in tiny_overrides(cub_root, tmp_path / "results") if not word.startswith("schedule.")]
    sweep = ["-m", *tiny, *run, "schedule.batch_size=4", "seed=range(4)"]
    sweep += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [str(Path(sys.executable).with_name("delta-run")), *sweep]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as p:
        training = set()
        for line in p.stdout:
            training |= set(re.findall(r"(cub-small_resnet-l2-s\d-\w{8}): iteration \d+/3000", line))
            if len(training) == 2:  # both workers train
                os.killpg(p.pid, signal.SIGINT)
                break
        output = p.stdout.read()
    assert p.returncode == 128 + signal.SIGINT, output
    assert re.search(r"^ *stopped +4\b", output, re.MULTILINE) and "Traceback" not in output, output
    runs = {path.name for path in (tmp_path / "results" / "runs").iterdir()}
    assert runs == training
    assert {path.parent.name for path in tmp_path.glob("results/runs/*/last.pt")} == training
    assert not list(tmp_path.glob("results/runs/*/.lock"))


# --- determinism ---


def test_two_fresh_processes_make_the_same_run(undisturbed, cub_root, tmp_path):
    method, expected, _ = undisturbed
    status, output = finish(command(cub_root, tmp_path / "results", *method))
    assert status == 0, output
    assert_the_same(only_run(tmp_path / "results"), expected)


def test_two_fresh_processes_make_the_same_deterministic_run(undisturbed, cub_root, tmp_path):
    method, _, _ = undisturbed
    children = [start(command(cub_root, tmp_path / name, *method, "deterministic=true")) for name in "ab"]
    for child in children:
        assert child.wait() == 0, child.text()
    assert_the_same(*(only_run(tmp_path / name) for name in "ab"))
