"""One process at a time, on one machine or several, and what happens to locks whose owner is gone."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import SoftFileLease, Timeout

from delta_transfer.records import locks
from delta_transfer.records.locks import InUse, try_lock, wait_for_lock
from delta_transfer.records.run_directory import RunDirectory

HOLD = "import sys, time; from delta_transfer.records.locks import try_lock; from pathlib import Path\n"
HOLD += "with try_lock(Path(sys.argv[1]), 'the run'): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def owner(tmp_path):
    """Another process that holds tmp_path/lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    process.stdout.close()


def of_another_machine(lock: Path) -> None:
    """Makes the lock look as if another machine held it: here its process cannot be asked for."""
    text = lock.read_text()
    lock.write_text(re.sub("^host=.*$", "host=elsewhere", text, flags=re.MULTILINE))


def claim(path: Path) -> None:
    with try_lock(path, "the run"):
        pass


def test_a_claim_does_not_wait_and_names_the_owner(tmp_path, owner):
    with pytest.raises(InUse, match=rf"the run .*: process {owner.pid} on "):
        claim(tmp_path / "lock")


def test_a_lock_whose_process_was_killed_is_taken_over_at_once(tmp_path, owner, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1e6)  # no waiting for the lease
    owner.kill()
    owner.wait()
    assert (tmp_path / "lock").exists()
    claim(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()


def test_a_lock_that_another_machine_left_is_taken_over_when_it_shows_no_sign_of_life(tmp_path, owner, monkeypatch):
    owner.kill()
    owner.wait()
    of_another_machine(tmp_path / "lock")
    monkeypatch.setattr(locks, "LEASE_SECONDS", lease_seconds(tmp_path / "lock", 1.0))
    acquire, refused = SoftFileLease.acquire, []

    def watched(lease: SoftFileLease, timeout: float | None = None):
        try:
            return acquire(lease, timeout)
        except Timeout:
            refused.append(timeout)
            raise

    monkeypatch.setattr(SoftFileLease, "acquire", watched)
    claim(tmp_path / "lock")
    assert refused == [0]  # not before it could have shown one


def lease_seconds(lock: Path, seconds: float) -> float:
    """All that wait for a lock must agree on the time."""
    text = lock.read_text()
    lock.write_text(re.sub("^duration=.*$", f"duration={seconds}", text, flags=re.MULTILINE))
    return seconds


def test_a_lock_that_another_machine_keeps_touching_is_not_taken_over(tmp_path, owner, monkeypatch):
    owner.kill()
    owner.wait()
    lock = tmp_path / "lock"
    of_another_machine(lock)
    monkeypatch.setattr(locks, "LEASE_SECONDS", lease_seconds(lock, 1.0))
    touch = f"import os, time\nfor i in range(40): os.utime({str(lock)!r}); time.sleep(0.1)"
    with subprocess.Popen([sys.executable, "-c", touch]) as alive:
        with pytest.raises(InUse, match="on elsewhere"):
            claim(lock)
        alive.kill()


@pytest.mark.parametrize("jump", [-1e7, 1e7])
def test_a_clock_that_jumps_takes_no_lock_away(tmp_path, owner, monkeypatch, jump):
    """What the file says about time is not compared with a clock."""
    os.utime(tmp_path / "lock", (time.time() + jump, time.time() + jump))
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() - jump)
    with pytest.raises(InUse):
        claim(tmp_path / "lock")


def test_who_was_suspended_too_long_notices_that_its_lock_is_gone(tmp_path):
    with try_lock(tmp_path / "lock", "the run") as check:
        check()
        (tmp_path / "lock").unlink()  # taken over, and released again
        with pytest.raises(InUse, match="taken over by a process that is just ending"):
            check()
        with (
            try_lock(tmp_path / "lock", "the run"),
            pytest.raises(InUse, match=rf"taken over by process {os.getpid()}"),
        ):
            check()


def test_a_work_that_another_process_does_is_waited_for(tmp_path, owner, capsys):
    def end() -> None:
        time.sleep(0.5)
        owner.kill()
        owner.wait()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(end)
        with wait_for_lock(tmp_path / "lock", "builds the store") as check:
            check()
            assert owner.poll() is not None
    assert f"waiting for another process that builds the store: process {owner.pid}" in capsys.readouterr().out


def test_without_locks_a_notice_is_given(tmp_path, monkeypatch, capsys):
    def refuse(*args, **options):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(SoftFileLease, "acquire", refuse)
    with wait_for_lock(tmp_path / "lock", "builds the store") as check:
        check()
    assert "cannot be locked ([Errno 37] No locks available): let no other process" in capsys.readouterr().out


def test_without_locks_a_run_is_made_all_the_same(tmp_path, monkeypatch, capsys):
    def refuse(*args, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(SoftFileLease, "acquire", refuse)
    with RunDirectory(tmp_path / "run") as directory:
        directory.write("config.yaml", b"seed: 0")
    assert "No locks available" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.yaml").read_bytes() == b"seed: 0"


@pytest.mark.parametrize("content", [b"", b"\xff\0{{{", b"filelock/2\npid=9\nho"])
def test_a_damaged_lock_gives_way(tmp_path, content, monkeypatch):
    monkeypatch.setattr(locks, "DAMAGED_SECONDS", 0.1)
    (tmp_path / ".lock").write_bytes(content)
    (tmp_path / "last.pt").touch()
    RunDirectory(tmp_path).clear_away()
    assert not list(tmp_path.iterdir())


def test_a_finished_run_loses_its_checkpoint_whoever_left_the_lock(tmp_path):
    (tmp_path / ".lock").write_text("filelock/2\npid=9\nhost=elsewhere\nmode=lease\ntoken=a\nduration=5.0\n")
    (tmp_path / "last.pt").touch()
    with pytest.raises(InUse):  # of other settings than ours
        claim(tmp_path / ".lock")
    RunDirectory(tmp_path).clear_away()
    assert not (tmp_path / "last.pt").exists()
