"""One run in two processes is the run in one process."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from delta_transfer.engine import devices
from delta_transfer.engine.devices import WholeBatchNorm, synchronise_batchnorm

from . import children
from .miniature import delta_run, tiny_overrides, write_cub

METHODS = ("l2", "l2_fe", "l2_sp", "delta", "afa")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
MEASURED = {"images_per_second"}  # differs; everything else in metrics.jsonl has to agree


def torchrun(*overrides: str) -> list[str]:
    # --standalone: a free port of its own.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*launcher, "-m", "delta_transfer.train", *overrides]


@dataclass
class Rank:
    """What torchrun tells a process. Forked children start in a tenth of the time of its processes."""

    rank: int
    port: int

    def __call__(self) -> None:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        of_process = {"RANK": self.rank, "LOCAL_RANK": self.rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ.update({name: str(value) for name, value in (place | of_process).items()})


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory) -> tuple[Path, Path, list[children.Child]]:
    """The same sweep made by one process and by two. Two processes end at a last batch size that they cannot share."""
    folder = tmp_path_factory.mktemp("sweeps")
    root = write_cub(folder / "CUB_200_2011")
    options = ["schedule.iterations=2", "schedule.eval_every=1", "schedule.lr=0.003", f"reg={','.join(METHODS)}"]
    options += ["reg.attention.images=4", "reg.attention.head_epochs=1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ["-m", *tiny_overrides(root, folder / "two"), "schedule.batch_size=12,5", *options]
    both = [children.start(shared, Rank(rank, port)) for rank in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        alone = ["-m", *tiny_overrides(root, folder / "one"), "schedule.batch_size=12", *options]
        assert delta_run(patch, *alone) == 0
    for child in both:
        child.wait()
    return folder / "one" / "runs", folder / "two" / "runs", both


def test_two_processes_make_the_run_of_one(sweeps):
    one_process, two_processes, (first, second) = sweeps
    assert "Warning" not in first.text() + second.text()
    single_runs = sorted(one_process.iterdir())
    assert len(single_runs) == len(METHODS)
    for single in single_runs:
        other = two_processes / single.name
        assert {path.name for path in other.iterdir()} == {path.name for path in single.iterdir()}
        lines = metrics(single)
        assert len(lines) == len(metrics(other)) == (4 if "-afa-" in single.name else 2)  # two stages
        for one, two in zip(lines, metrics(other), strict=True):
            assert one.keys() == two.keys()
            # Sums in another order; training amplifies that.
            tolerance = 1e-5 if one["step"] == 1 else 1e-3
            for key in one.keys() - MEASURED:
                assert two[key] == pytest.approx(one[key], rel=tolerance, abs=1e-6), (single.name, key)
        one, two = (np.load(run / "predictions.npz") for run in (single, other))
        assert np.array_equal(one["labels"], two["labels"]) and np.array_equal(one["index"], two["index"])
        np.testing.assert_allclose(two["logits"], one["logits"], rtol=1e-3, atol=1e-4)
        summary = json.loads((other / "summary.json").read_text())
        assert summary["processes"] == 2 and summary["error"] is None
        # The first process alone speaks.
        assert first.text().count(f"{single.name}: test top-1") == 1 and single.name not in second.text()


@pytest.mark.faults
@pytest.mark.parametrize("reg", ["l2", "afa"])
def test_a_killed_process_ends_the_others_and_the_run_goes_on_from_its_checkpoint(reg, tmp_path):
    """AFA is killed in its second stage."""
    stages = 2 if reg == "afa" else 1
    root = write_cub(tmp_path / "CUB_200_2011")
    tiny = [word for word in tiny_overrides(root, tmp_path / "results") if not word.startswith("schedule.")]
    schedule = [f"schedule.iterations={300 // stages}", "schedule.batch_size=4", "schedule.log_every=10"]
    overrides = [*tiny, f"reg={reg}", "schedule.lr=0.001", *schedule, "schedule.checkpoint_seconds=0.01"]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(torchrun(*overrides), **both, env=ONE_THREAD) as shared:
        for line in shared.stdout:
            if "iteration 210/300" in line:
                children = Path(f"/proc/{shared.pid}/task/{shared.pid}/children").read_text().split()
                os.kill(int(children[1]), signal.SIGKILL)
                break
        shared.stdout.read()
    assert shared.returncode != 0
    (run,) = (tmp_path / "results" / "runs").iterdir()
    assert (run / "last.pt").exists() and not (run / "summary.json").exists()
    again = subprocess.run(torchrun(*overrides), capture_output=True, text=True, env=ONE_THREAD)
    assert again.returncode == 0 and "resuming after iteration" in again.stdout
    assert [line["step"] for line in metrics(run)] == list(range(10, 301, 10))
    number = int(again.stdout.partition("resuming after iteration ")[2].split()[0])
    assert 150 <= number < 300


def test_a_batch_that_cannot_be_shared_ends_all_processes(sweeps):
    _, two_processes, both = sweeps
    for child in both:
        assert child.wait() != 0
    assert "schedule.batch_size=5" in both[0].text()
    assert len(list(two_processes.iterdir())) == len(METHODS)


def test_batchnorm_of_the_whole_batch_is_batchnorm(monkeypatch):
    """With one process; that of two is compared by the runs above."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    other.load_state_dict(network.state_dict())
    monkeypatch.setattr(devices, "processes", lambda: 2)
    synchronise_batchnorm(other, torch.device("cpu"))
    monkeypatch.setattr(devices, "processes", lambda: 1)
    assert type(other[1]) is WholeBatchNorm and network.state_dict().keys() == other.state_dict().keys()
    images = torch.randn(4, 3, 8, 8)
    for _ in range(2):
        for net in (network, other):
            net.zero_grad()
            net(images).square().sum().backward()
        for one, two in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-4)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value)
    torch.testing.assert_close(other.eval()(images), network.eval()(images))
