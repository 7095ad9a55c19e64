"""Sweeps in worker processes, through Hydra's launchers: nothing that a sweep in one process does may get lost."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from delta_transfer.common import cores
from delta_transfer.common.console import log
from delta_transfer.engine import devices

from .miniature import delta_run, tiny_overrides, write_cub

LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],  # Slurm's without Slurm: a process per job
}


@pytest.mark.parametrize("launcher", ["joblib", pytest.param("submitit", marks=pytest.mark.slow)])
def test_a_parallel_sweep_skips_runs_and_survives_a_failure(launcher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root = write_cub(tmp_path / "CUB_200_2011")
    tiny = [*tiny_overrides(root, Path("results")), "reg=l2"]
    assert delta_run(monkeypatch, *tiny) == 0
    (finished,) = Path("results/runs").glob("*/summary.json")
    before = finished.read_bytes()

    # Four jobs: one finished, one to do, and two that fail.
    arguments = ["-m", *tiny, *LAUNCHERS[launcher], "seed=0,1", "split.val_fraction=0,0.01"]
    # Both ways to start it are the same command in the record.
    module = [sys.executable, "-m", "delta_transfer.train"]
    program = [str(Path(sys.executable).with_name("delta-run"))] if launcher == "submitit" else module
    sweep = subprocess.run([*program, *arguments], capture_output=True, text=True)
    assert sweep.returncode == 1, sweep.stderr
    # One message each, no traceback, nothing of Hydra's.
    assert re.fullmatch(r"(error: .*validation split.*\n){2}", sweep.stderr)

    assert finished.read_bytes() == before
    (new,) = (path for path in Path("results/runs").glob("*/summary.json") if path != finished)
    summary = json.loads(new.read_text())
    assert summary["seed"] == 1 and summary["error"] is None and summary["test_top1"] is not None
    assert summary["command"] == " ".join(["delta-run", *arguments])
    assert "seed=1" in summary["overrides"]
    # Each job's output is in the terminal, or in a file where the job may be on another machine.
    logs = "".join(path.read_text() for path in Path("results/sweep").glob(".submitit/*/*_log.out"))
    output = sweep.stdout + logs
    assert output.count("done, skipped") == 1 and "iteration 3/3" in output
    # Nothing of Hydra is left elsewhere.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CUB_200_2011", "results"]
    left = {"multirun.yaml", ".submitit"} if launcher == "submitit" else {"multirun.yaml"}
    assert {path.name for path in Path("results/sweep").iterdir()} == left


def test_a_dry_run_plans_all_jobs_whatever_would_launch_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = write_cub(tmp_path / "CUB_200_2011")
    sweep = ["-m", *tiny_overrides(root, Path("results")), "reg=l2", "seed=0,1", *LAUNCHERS["joblib"]]
    assert delta_run(monkeypatch, *sweep, "dry_run=true") == 0
    assert "2 runs: 0 finished, 2 to do" in capsys.readouterr().out
    # Spelled otherwise it reaches the workers, which cannot plan together. (One worker of joblib is this process.)
    assert delta_run(monkeypatch, *sweep[:-2], "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "dry_run=True") == 1
    assert "needs hydra/launcher=basic" in capsys.readouterr().err
    # Such a worker makes Hydra's list of plugins anew. The next sweep is checked before it starts all the same.
    assert delta_run(monkeypatch, *sweep[:-2], "+foo=1") == 1
    assert not Path("results").exists()


def test_a_command_and_not_each_worker_says_that_the_machine_is_busy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cores, "others", 16.0)
    seen = []  # the load of other programs that a message would name
    monkeypatch.setattr(devices, "share_cores", lambda: seen.append(cores.others))
    words = [*tiny_overrides(write_cub(tmp_path / "CUB_200_2011"), tmp_path / "results"), "reg=l2", "seed=0,1"]
    # One worker of joblib is this process.
    assert delta_run(monkeypatch, "-m", *words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1") == 0
    assert seen[0] == 16 and len(seen) > 1 and not any(seen[1:])


def test_a_line_on_the_screen_is_one_write(monkeypatch):
    """Parallel runs share a terminal: another run's line may split a line that is written in two parts."""
    written = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    log.info("done")
    assert [text for text in written if text] == ["done\n"]
