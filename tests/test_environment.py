"""Which GPU a process takes, with GPUs that are not there."""

import mmap
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from delta_transfer.engine.devices import claim_gpu, peak_memory, pick_device, reset_peak_memory

# Another process that has claimed a GPU: it holds the lock file of argv[1] until its input ends.
HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """As many GPUs as it is called with; a list of the devices that were made the current one."""
    current = []

    def pretend(count: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"uuid-{i}"))
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    claim_gpu.cache_clear()
    yield pretend
    claim_gpu.cache_clear()


def held_by_another_process(tmp_path, index: int) -> subprocess.Popen:
    path = tmp_path / f"delta-run-{os.getuid()}-uuid-{index}.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    return holder


def test_the_second_process_on_one_gpu_says_that_they_share_it(gpus, tmp_path, capsys):
    """As a worker of joblib does."""
    gpus(1)
    with held_by_another_process(tmp_path, 0) as holder:
        assert pick_device("auto") == torch.device("cuda", 0)
        holder.stdin.close()
    assert "share a GPU" in capsys.readouterr().out
    claim_gpu.cache_clear()
    assert pick_device("cuda") == torch.device("cuda", 0) and not capsys.readouterr().out


def test_a_process_takes_the_first_free_gpu_and_keeps_it(gpus, tmp_path, capsys):
    current = gpus(3)
    with held_by_another_process(tmp_path, 0) as holder:
        assert pick_device("auto") == torch.device("cuda", 1)
        holder.stdin.close()
    assert pick_device("cuda") == torch.device("cuda", 1)  # a later job of the sweep
    assert current == [1, 1]
    assert not capsys.readouterr().out


def test_more_processes_than_gpus_share_and_say_so(gpus, tmp_path, monkeypatch, capsys):
    gpus(2)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with held_by_another_process(tmp_path, 0) as first, held_by_another_process(tmp_path, 1) as second:
        assert pick_device("auto") == torch.device("cuda", 1)
        first.stdin.close()
        second.stdin.close()
    assert "Every GPU has a run already (2 in all)" in capsys.readouterr().out


def test_under_torchrun_the_local_rank_decides(gpus, tmp_path, monkeypatch):
    current = gpus(4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device("auto") == torch.device("cuda", 2)
    assert current == [2] and not list(tmp_path.iterdir())
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not forget a peak")
def test_the_peak_of_memory_is_the_process_own_without_mapped_files(tmp_path):
    cpu, size = torch.device("cpu"), 40 * 2**20
    np.ones(2 * size, dtype=np.uint8).tofile(tmp_path / "store")
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    store = np.memmap(tmp_path / "store", dtype=np.uint8, mode="r")
    assert store.sum() == 2 * size
    assert peak_memory(cpu) - before < size / 2  # though all of it is resident
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own:  # malloc may have free pages
        for _ in range(size // 2**20):
            own.write(b"1" * 2**20)
    assert 0.8 * size < peak_memory(cpu) - before < 1.5 * size
    assert peak_memory(cpu) - before > 0.8 * size  # the largest so far
    reset_peak_memory(cpu)
    assert peak_memory(cpu) - before < size / 2
