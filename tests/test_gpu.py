"""What only a GPU can show: it computes what a CPU does, no step waits for it, and its memory may not suffice.

All of it is skipped without one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file

from delta_transfer.cli.sources import choices
from delta_transfer.data.loader import Loader
from delta_transfer.data.store import Store
from delta_transfer.engine import loop
from delta_transfer.engine.callbacks import MetricsWindow
from delta_transfer.engine.graphed_step import GraphedStep
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import ScheduleConfig, SGDConfig, make_optimizer
from delta_transfer.engine.tasks import evaluate
from delta_transfer.methods import DELTA, FM, L2SP, L2TWW, AFAChannel, AFASpatial
from delta_transfer.methods.attention import channel_importance
from delta_transfer.methods.base import Batch
from delta_transfer.methods.fast.cuda_graph import Replayed
from delta_transfer.models import Network, frozen_maps

from .conftest import randomise_batchnorm
from .miniature import delta_run, source_for, tiny_overrides, write_cub

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def cub_root(tmp_path_factory) -> Path:
    return write_cub(tmp_path_factory.mktemp("data") / "CUB_200_2011")


@pytest.fixture
def exact(monkeypatch):
    """fp32 is fp32, as on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(root: Path, results: Path, *more: str) -> list[str]:
    return [*(word for word in tiny_overrides(root, results) if word != "device=cpu"), "device=cuda", *more]


def summary_of(results: Path) -> dict:
    (path,) = results.glob("runs/*/summary.json")
    return json.loads(path.read_text())


def options_of(reg: str, folder: Path) -> list[str]:
    more = {
        "delta": ["reg.attention.images=6", "reg.attention.head_epochs=2"],
        "sum": ["+reg@reg.terms.l2_sp=l2_sp", "reg.name=sums"],
    }
    return [f"reg={reg}", *more.get(reg, []), *source_for(reg, folder)]


# --- whole runs ---


@pytest.mark.parametrize("reg", choices("reg"))
def test_every_method_runs_and_no_step_waits_for_the_device(reg, cub_root, tmp_path, monkeypatch):
    """A wait is an error from each stage's second step on, until a line of metrics is written.

    BSS waits: a decomposition is checked for convergence.
    """
    make_batch, close = loop.make_batch, MetricsWindow.close
    seen = []

    def before_step(*arguments):
        batch = make_batch(*arguments)
        if seen and reg != "bss":
            torch.cuda.set_sync_debug_mode("error")
        seen.append(1)
        return batch

    def at_a_line(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        seen.clear()
        return close(*arguments)

    monkeypatch.setattr(loop, "make_batch", before_step)
    monkeypatch.setattr(MetricsWindow, "close", at_a_line)
    command = on_gpu(cub_root, tmp_path, *options_of(reg, tmp_path), "schedule.log_every=100", "precision=bf16")
    try:
        assert delta_run(monkeypatch, *command, "schedule.iterations=6") == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    summary = summary_of(tmp_path)
    assert summary["device"].startswith("cuda: ") and summary["peak_memory_bytes"] > 0


def test_a_run_is_the_run_of_the_cpu(cub_root, tmp_path, monkeypatch, exact):
    """The results differ only by rounding, which training amplifies."""
    common = ["reg=delta_noatt", "precision=fp32", "schedule.lr=0.001"]
    assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path / "cpu"), *common) == 0
    assert delta_run(monkeypatch, *on_gpu(cub_root, tmp_path / "gpu", *common)) == 0
    lines, others = (
        [json.loads(line) for line in next((tmp_path / name).glob("runs/*/metrics.jsonl")).read_text().splitlines()]
        for name in ("cpu", "gpu")
    )
    for line, other in zip(lines, others, strict=True):
        for key in line.keys() - {"images_per_second"}:
            assert other[key] == pytest.approx(line[key], rel=1e-3, abs=1e-4), key
    # The device is no part of a run's name: it is the same run.
    assert summary_of(tmp_path / "cpu")["run_id"] == summary_of(tmp_path / "gpu")["run_id"]


def test_a_killed_deterministic_run_ends_the_same(cub_root, tmp_path, monkeypatch):
    common = [*options_of("delta", tmp_path), "deterministic=true", "schedule.iterations=40", "schedule.log_every=1"]
    common.append("schedule.checkpoint_seconds=0.001")
    assert delta_run(monkeypatch, *on_gpu(cub_root, tmp_path / "whole", *common)) == 0
    command = [sys.executable, "-m", "delta_transfer.train", *on_gpu(cub_root, tmp_path / "killed", *common)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "iteration 2" in line:
                process.kill()
                break
    (run,) = (tmp_path / "killed" / "runs").iterdir()
    assert (run / "last.pt").exists() and not (run / "summary.json").exists()
    assert delta_run(monkeypatch, *on_gpu(cub_root, tmp_path / "killed", *common)) == 0
    expected, resumed = (
        load_file(next((tmp_path / name).glob("runs/*/model.safetensors"))) for name in ("whole", "killed")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_one_process_of_torchrun_makes_the_same_run(cub_root, tmp_path, monkeypatch, exact):
    """NCCL and SyncBatchNorm, as far as one GPU can show them."""
    common = ["reg=delta_noatt", "precision=fp32", "schedule.lr=0.001"]
    assert delta_run(monkeypatch, *on_gpu(cub_root, tmp_path / "alone", *common)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += ["-m", "delta_transfer.train", *on_gpu(cub_root, tmp_path / "launched", *common)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone, launched = (summary_of(tmp_path / name)["test_loss"] for name in ("alone", "launched"))
    assert launched == pytest.approx(alone, rel=1e-2)


def test_a_gpu_that_is_too_small_says_what_fits(cub_root, tmp_path, monkeypatch):
    command = on_gpu(cub_root, tmp_path, "reg=delta_noatt", "backbone=resnet50", "backbone.weights=none")
    command += ["backbone.image_size=128", "backbone.resize=140", "schedule.batch_size=64", "precision=fp32"]
    try:
        limit = 1.5 * 2**30 / torch.cuda.get_device_properties(GPU).total_memory
        torch.cuda.set_per_process_memory_fraction(limit)
        assert delta_run(monkeypatch, *command) == 1
        summary = summary_of(tmp_path)
        assert summary["failure"] == "out of memory" and "fits (tried just now)" in summary["error"]
        (advised,) = (word.rstrip(":") for word in summary["error"].split() if word.startswith("schedule.accumulate="))
        assert delta_run(monkeypatch, *command, advised) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_dry_run_measures_memory(cub_root, tmp_path, monkeypatch, capsys):
    assert delta_run(monkeypatch, *on_gpu(cub_root, tmp_path, "reg=delta_noatt", "dry_run=true")) == 0
    assert "measured" in capsys.readouterr().out


def test_predictions_are_those_of_the_cpu(cub_root, tmp_path, monkeypatch):
    assert delta_run(monkeypatch, *on_gpu(cub_root, tmp_path, "reg=l2", "precision=fp32")) == 0
    (run,) = (tmp_path / "runs").iterdir()
    found = {}
    for device in ("cpu", "cuda"):
        command = [sys.executable, "-m", "delta_transfer.cli.predict", run, cub_root / "images", "--format", "json"]
        done = subprocess.run([*map(str, command), "--device", device], capture_output=True, text=True, check=True)
        images = json.loads(done.stdout)["images"]
        found[device] = [[entry["probability"] for entry in image["classes"]] for image in images]
    np.testing.assert_allclose(found["cuda"], found["cpu"], atol=2e-3)  # TF32


# --- batches ---


@pytest.mark.parametrize("options", [{}, {"pad": 2}, {"min_crop_area": 0.3}, {"ten_crops": True}], ids=str)
@pytest.mark.parametrize("room", [True, False])
def test_batches_are_those_of_the_cpu(options, room, monkeypatch):
    """The store in GPU memory, and in the machine's where it does not fit."""
    if not room:
        monkeypatch.setattr("delta_transfer.data.loader.free_memory", lambda device: 0)
    sizes = np.array([[12, 10], [10, 15], [11, 11]] * 4)
    pixels = np.random.default_rng(0).integers(0, 256, (sizes.prod(axis=1).sum(), 3), dtype=np.uint8)
    common = {"crop": 8, "mirror": True, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "batch_size": 8, "seed": 0}
    loaders = [Loader(Store(pixels, sizes), np.arange(12) % 3, device=d, **common, **options) for d in (CPU, GPU)]
    assert loaders[1].pixels.is_cuda == room
    indices = np.arange(12)
    pairs = [[loader.train_batch(indices, number) for loader in loaders] for number in range(3)]
    pairs += list(zip(*(loader.test_batches(indices) for loader in loaders), strict=False))[:1]
    for (images, labels), (on_device, its_labels) in pairs:
        count = min(len(images), len(on_device))  # in evaluation a GPU takes more at once
        assert on_device.is_cuda and on_device.is_contiguous(memory_format=torch.channels_last)
        # Resized crops are rounded in another way: by one of 255 steps at most.
        step = 1.01 / 255 / min(common["std"]) if "min_crop_area" in options else 1e-5
        torch.testing.assert_close(on_device[:count].cpu(), images[:count], rtol=1e-5, atol=step)
        assert torch.equal(its_labels[:count].cpu(), labels[:count])


# --- steps ---


SIDE = 64  # pixels


class Exact(TrainState):
    """In float64 throughout."""

    def task_loss(self, outputs, labels):
        return {"cross_entropy": F.cross_entropy(outputs["logits"], labels)}


def learning(method, device: torch.device, precision: str = "fp32", dtype: torch.dtype = torch.float32):
    """ResNet-18 with random weights at the start of training; and a batch."""
    taps = ("layer1.1.conv2", "layer3.1.conv2")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7)
    randomise_batchnorm(model)
    source = Network(model, "fc", taps).freeze()
    target = source.with_new_head(5, seed=0).requires_grad_(True).train()
    shapes = target.map_shapes(8, SIDE, training=True)
    for network in (source, target):
        network.to(device, dtype, memory_format=torch.channels_last)
    torch.manual_seed(1)
    method.setup(target, shapes)
    method.to(device, dtype, memory_format=torch.channels_last)
    if isinstance(method, DELTA):
        weights = torch.linspace(-1, 1, 64), torch.linspace(1, -1, 256)
        method.load_fitted({tap: w.to(device) for tap, w in zip(taps, weights, strict=True)})
    optimizer = make_optimizer(target, method, SGDConfig(), ScheduleConfig(iterations=1, lr=0.01))
    maps = frozen_maps(source, precision=precision) if method.needs.source else None
    images = torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=dtype)
    labels = torch.arange(8, device=device) % 5
    state = (Exact if dtype == torch.float64 else TrainState)(target, maps, optimizer, precision)
    return state, Batch(images.to(device, memory_format=torch.channels_last), labels)


METHODS = {
    "l2_sp": lambda: L2SP(0.1),
    "delta": lambda: DELTA(1e-4),
    "afa_spatial": lambda: AFASpatial(1e-4),
    "afa_channel": lambda: AFAChannel(1e-4),
    "fm": lambda: FM(0.01),
    "l2t_ww": lambda: L2TWW(alpha=0.01, meta_lr=1e-3),
}


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_the_cpu(name):
    """In float64. L2T-ww's look-ahead is recorded in the third step and replayed from then on."""
    results = []
    for device in (CPU, GPU):
        method = METHODS[name]()
        state, batch = learning(method, device, dtype=torch.float64)
        found = {}
        for step in range(5):
            for group in state.optimizer.param_groups:
                group["lr"] = 1e-3 / (1 + step)  # it changes, as along a cosine
            rolled = Batch(batch.images.roll(step, dims=0), batch.labels.roll(step))
            method.before_step(state, step, 5, seed=step)
            logits, losses, extra_metrics = train_step(state, method, rolled)
            found |= {f"{key} {step}": value for key, value in ({"logits": logits} | losses | extra_metrics).items()}
        found |= {key: p.detach() for key, p in state.target.traced.named_parameters()}
        found |= {key: p.detach() for key, p in method.named_parameters()}
        results.append({key: value.cpu() for key, value in found.items()})
        if isinstance(method, L2TWW):
            assert method.replayed.calls == 5 and not method.replayed.refused
            assert (method.replayed.graph is not None) == (device == GPU)
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("reg", ["l2", "l2_fe", "l2_sp", "delta_noatt", "delta"])
def test_a_whole_step_is_replayed(reg, optimizer, cub_root, tmp_path, monkeypatch):
    graphs, call = [], GraphedStep.__call__

    def called(self, *arguments):
        result = call(self, *arguments)
        graphs.append(self.replayed.graph)
        return result

    monkeypatch.setattr(GraphedStep, "__call__", called)
    losses = []
    for number, graph in enumerate(("false", "true")):
        words = [*options_of(reg, tmp_path), f"optimizer={optimizer}", "schedule.iterations=8", f"cuda_graph={graph}"]
        assert delta_run(monkeypatch, *on_gpu(cub_root, tmp_path / str(number), *words, "precision=fp32")) == 0
        losses.append(summary_of(tmp_path / str(number))["test_loss"])
    assert len(graphs) == 8 and graphs[-1] is not None
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    "words", [("reg=stochnorm",), ("reg=l2", "backbone=mobilenet_v2", "backbone.weights=none")], ids=" ".join
)
def test_a_replayed_step_draws_what_a_launched_one_draws(words, cub_root, tmp_path, monkeypatch):
    """Each of eight steps draws channels, or dropout, with a seed of its own."""
    steps, call = [], GraphedStep.__call__
    monkeypatch.setattr(GraphedStep, "__call__", lambda self, *of: steps.append(self) or call(self, *of))
    lines = []
    for number, graph in enumerate(("false", "true")):
        more = ["precision=fp32", "schedule.lr=0.001", "schedule.iterations=8", f"cuda_graph={graph}"]
        assert delta_run(monkeypatch, *on_gpu(cub_root, tmp_path / str(number), *words, *more)) == 0
        (path,) = (tmp_path / str(number)).glob("runs/*/metrics.jsonl")
        lines.append([json.loads(line) for line in path.read_text().splitlines()])
    assert len(steps) == 8 and steps[-1].replayed.graph is not None
    for line, other in zip(*lines, strict=True):
        for key in line.keys() - {"images_per_second"}:
            assert other[key] == pytest.approx(line[key], rel=1e-3, abs=1e-4), key


def test_what_cannot_be_recorded_is_launched_as_it_is(capsys):
    """Afterwards random numbers are drawn as before."""

    def waits(tensors):
        return [F.dropout(tensors[0], 0.5) * tensors[0].sum().item()]

    replayed, value = Replayed(), torch.ones(1000, device=GPU)
    for _ in range(5):
        assert 0 < replayed(waits, [value])[0].count_nonzero().item() < 1000
    assert replayed.refused and capsys.readouterr().out.count("No CUDA graph") == 1


def test_other_shapes_than_those_recorded_are_launched():
    replayed = Replayed()
    for size in (2, 2, 2, 2, 3, 3, 2):
        value = torch.rand(size, device=GPU)
        assert torch.equal(replayed(lambda tensors: [tensors[0] * 2], [value])[0], value * 2)


def test_bf16_penalties_are_those_of_fp32_but_for_the_maps(exact):
    terms = []
    for precision in ("fp32", "bf16"):
        method = DELTA(1e-4)
        state, batch = learning(method, GPU, precision=precision)
        terms.append(train_step(state, method, batch)[1])
    assert terms[1] and all(value.dtype == torch.float32 for value in terms[1].values())
    for name, value in terms[0].items():
        assert terms[1][name].item() == pytest.approx(value.item(), rel=0.05), name


def test_channel_importance_is_that_of_the_cpu(exact):
    found = []
    for device in (CPU, GPU):
        state, batch = learning(DELTA(1e-4), device)
        network = state.target.eval().freeze()
        rises = channel_importance(network, [(batch.images, batch.labels)], 8)
        found.append({tap: rise.mean(dim=0).cpu() for tap, rise in rises.items()})
    assert found[0] and found[0].keys() == found[1].keys()
    for tap, rise in found[0].items():
        torch.testing.assert_close(found[1][tap], rise, rtol=1e-2, atol=1e-5)


def test_evaluation_with_too_little_memory_goes_on_with_fewer_images():
    sizes = np.full((300, 2), 64)
    pixels = np.random.default_rng(0).integers(0, 256, (300 * 64**2, 3), dtype=np.uint8)
    look = {"crop": 64, "mirror": True, "mean": [0.5] * 3, "std": [0.25] * 3, "batch_size": 8, "seed": 0}
    loader = Loader(Store(pixels, sizes), np.arange(300) % 5, device=GPU, **look)
    state, _ = learning(L2SP(0.1), GPU)
    whole = evaluate(state.target, loader, np.arange(300))
    torch.cuda.empty_cache()
    try:
        limit = (torch.cuda.memory_reserved() + 2**27) / torch.cuda.get_device_properties(GPU).total_memory
        torch.cuda.set_per_process_memory_fraction(limit)
        small = evaluate(state.target, loader, np.arange(300))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert loader.images_at_once < 256
    np.testing.assert_allclose(small["logits"], whole["logits"], atol=1e-2)


def test_a_gpu_is_named_by_the_doctor():
    done = subprocess.run(
        [sys.executable, "-m", "delta_transfer.cli.data", "doctor"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert torch.cuda.get_device_name() in done.stdout
