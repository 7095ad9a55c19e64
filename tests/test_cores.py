"""How busy a machine is, and what a command makes of that."""

import os
import platform
import re
import subprocess
import sys

import pytest
import torch

from delta_transfer.common import cores
from delta_transfer.engine import devices


@pytest.mark.parametrize(
    ("load", "running", "others"),
    [
        (0.1, 9, 0),  # a moment's work is no load
        (2.0, 1, 0),  # what made the load has ended
        (2.0, 7, 2),
        (8.0, 3, 2),
    ],
)
def test_other_work_is_what_the_last_minute_and_this_moment_have(load, running, others, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(cores, "_running", lambda: iter([running, running]))
    assert cores.busy_others() == others


def test_a_system_that_does_not_tell_counts_as_idle(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (4.0, 0.0, 0.0))
    monkeypatch.setattr(cores, "_lines", lambda path: [])  # macOS has no /proc
    assert cores.busy_others() == 0


def test_the_system_is_asked():
    assert 1 <= cores.USABLE <= os.cpu_count()
    assert all(count >= 1 for count in cores._running(2, 0.0))


def test_each_thread_of_another_program_counts():
    code = "import threading, zlib; data = bytes(2**24); print('ready', flush=True)"
    code += "; [threading.Thread(target=lambda: [zlib.crc32(data) for _ in range(1000)]).start() for _ in range(12)]"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            assert max(cores._running(20)) >= 8  # of 12, since some may wait for Python's lock
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("files", "quotas"),
    [
        ({"cpu.max": "max 100000"}, []),
        ({"cpu.max": "150000 100000"}, [1.5]),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, [2.0]),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ({}, []),
    ],
)
def test_quotas_of_containers(files, quotas, tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    assert cores._quotas() == quotas
    assert cores.usable_cores() == max(1, min([len(os.sched_getaffinity(0)), *map(int, quotas)]))


@pytest.mark.parametrize(
    ("threads", "others", "there", "times"), [(2, 0, 2, 1), (2, 1, 2, 2), (2, 6, 2, 7), (1, 6, 2, 4), (8, 8, 64, 1)]
)
def test_a_share_is_what_others_leave_or_as_much_as_each_of_them_gets(
    threads, others, there, times, monkeypatch, capsys
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "cpu_count", lambda: there)
    monkeypatch.setattr(cores, "others", others)
    devices.share_cores.__wrapped__()
    output = capsys.readouterr().out
    assert re.findall(r"(\d+) times", output) == ([str(times)] if times > 1 else [])
    assert ("OMP_NUM_THREADS" in output) is (threads > 1 and times > 1)  # not for who has one thread already


@pytest.mark.parametrize("of_a_person", [None, *cores.SETTINGS])
def test_threads_spin_briefly_on_a_busy_machine_unless_a_person_says_otherwise(of_a_person, monkeypatch):
    for name in (*cores.SETTINGS, cores.CHOSEN_ON):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    if of_a_person:
        monkeypatch.setenv(of_a_person, "7")
    monkeypatch.setattr(cores, "of_a_command", False)
    monkeypatch.setattr(cores, "others", 0.0)
    monkeypatch.delitem(sys.modules, "torch")
    own = "7" if of_a_person == "GOMP_SPINCOUNT" else None
    for others, chosen in ((0.1, own), (2.0, own if of_a_person else "1000")):
        monkeypatch.setattr(cores, "busy_others", lambda count=others: count)
        cores.begin_command()
        assert os.environ.get("GOMP_SPINCOUNT") == chosen
    assert (cores.CHOSEN_ON in os.environ) is (of_a_person is None)


@pytest.mark.parametrize(("chosen_on", "kept"), [(None, True), (platform.node(), True), ("the login node", False)])
def test_a_worker_keeps_what_was_chosen_for_its_own_machine(chosen_on, kept):
    environment = {name: value for name, value in os.environ.items() if name != cores.CHOSEN_ON}
    environment |= {"GOMP_SPINCOUNT": "7"} | ({cores.CHOSEN_ON: chosen_on} if chosen_on else {})
    code = "import os, sys, delta_transfer; print(os.environ.get('GOMP_SPINCOUNT') == '7', 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(kept), "False"]


def test_a_command_begins_before_torch_is_imported():
    code = "import sys, delta_transfer.cli; from delta_transfer.common import cores"
    code += "; print(cores.of_a_command, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "False"]  # torch reads the setting when it is imported


def test_a_command_keeps_within_its_quota_and_says_once_that_the_machine_is_busy(monkeypatch, capsys):
    threads = []
    monkeypatch.setattr(cores, "of_a_command", True)
    monkeypatch.setattr(cores, "USABLE", 2)
    monkeypatch.setattr(cores, "others", 2.0 * os.cpu_count())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    devices.share_cores.cache_clear()
    for _ in range(2):
        assert devices.pick_device("cpu").type == "cpu"
    assert threads == [2] and capsys.readouterr().out.count("times as long") == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    devices.share_cores.cache_clear()
    devices.pick_device("cpu")
    assert threads == [2]
    monkeypatch.setattr(cores, "of_a_command", False)  # another program chooses its threads itself
    monkeypatch.delenv("OMP_NUM_THREADS")
    devices.share_cores.cache_clear()
    devices.pick_device("cpu")
    assert threads == [2]
    devices.share_cores.cache_clear()
