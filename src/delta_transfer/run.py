"""One run: build, train, record."""

import contextlib
import io
import json
import os
import platform
import shlex
import sys
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from .config import RunConfig, require
from .console import Display, say
from .data import load_dataset
from .data.dataset import split_parts
from .data.loader import Loader
from .data.store import open_store
from .models.zoo import build_source, fingerprint
from .records import SCHEMA, RunDirectory, git_commit, run_id, run_identity, timestamp, write_atomically
from .regularizers import Regularizer, build_regularizer
from .training import Diverged, Learner, evaluate, make_optimizer, train


def run(config: RunConfig) -> dict[str, Any]:
    """Carry out the run that `config` describes, or find it finished; returns its summary."""
    device = pick_device(config.device)
    config.precision = pick_precision(config.precision, device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(config.deterministic)
    reset_peak_memory(device)

    regularizer = build_regularizer(config.reg)
    dataset = load_dataset(config.dataset)
    parts = split_parts(dataset, config.dataset, config.split)
    require(
        bool(config.backbone.taps) or not regularizer.needs_taps,
        f"reg={config.reg.name} compares feature maps, but backbone.taps is empty.",
    )
    source = build_source(config.backbone, config.seed, tapped=regularizer.needs_taps)
    random_weights = config.backbone.weights == "none"
    weights_fingerprint = "none" if random_weights else fingerprint(source.weights())

    identity = run_identity(config, dataset.fingerprint, weights_fingerprint)
    name = run_id(config, identity)
    results_dir, cache_dir = Path(config.results_dir), Path(config.cache_dir)
    with RunDirectory(results_dir / "runs" / name) as directory:
        summary = directory.summary()
        if summary is not None and summary.get("error") is None:
            say(f"{name}: done, skipped ({_accuracies(summary)})")
            return summary
        (directory.path / "summary.json").unlink(missing_ok=True)  # of a failed attempt
        write_atomically(directory.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode())

        with Display(f"{dataset.name}: decoding images", len(dataset.labels), "image") as display:
            store = open_store(dataset, config.backbone.resize, cache_dir, lambda done, _: display.update(done))

        batches = Loader(
            store,
            dataset.labels,
            crop=config.backbone.image_size,
            mirror=config.dataset.mirror,
            mean=config.backbone.mean,
            std=config.backbone.std,
            batch_size=config.schedule.batch_size,
            seed=config.seed,
            device=device,
        )
        source = source.to(device, memory_format=torch.channels_last).freeze()
        target = source.with_new_head(len(dataset.classes), config.seed).requires_grad_(True)
        if regularizer.fitted_name:
            fitted_to = {
                "method": config.reg.name,
                "backbone": config.backbone.name,
                "weights": fingerprint(source.weights()) if random_weights else weights_fingerprint,
                "taps": list(source.taps),
                "data": parts.fingerprint(dataset),
                "pixels": [
                    config.backbone.resize,
                    config.backbone.image_size,
                    config.backbone.mean,
                    config.backbone.std,
                ],
                "mirror": config.dataset.mirror,
                "batch_size": config.schedule.batch_size,
                "options": regularizer.fit_options(),
            }
            fit_batches = batches.passes(parts.train, "fit", regularizer.fit_seed)
            fit_or_reuse(regularizer, source, fit_batches, len(dataset.classes), fitted_to, directory.path, cache_dir)
        regularizer.to(device)
        regularizer.start(target)

        learner = Learner(
            target,
            source if regularizer.needs_source else None,
            make_optimizer(target, regularizer, config.schedule),
            config.precision,
            config.backbone.aux_weight,
            config.compile,
        )
        first_iteration, seconds_before = resume(directory, learner, regularizer)
        iterations = config.schedule.length(len(parts.train))

        # Every part is measured, nothing is selected: the last iteration is what counts.
        watched = ["val", "test"] if len(parts.val) else ["test"]
        latest: dict[str, dict[str, Any]] = {}

        def evaluate_now() -> dict[str, float]:
            line = {}
            for part in watched:
                latest[part] = evaluate(target, batches, getattr(parts, part), config.precision)
                line |= {f"{part}_top1": latest[part]["top1"], f"{part}_loss": latest[part]["loss"]}
            return line

        summary = {
            "schema": SCHEMA,
            "run_id": name,
            "config": asdict(config),
            "seed": config.seed,
            "n_train": len(parts.train),
            "n_val": len(parts.val),
            "n_test": len(parts.test),
            "num_classes": len(dataset.classes),
            "dataset_fingerprint": dataset.fingerprint,
            "weights_fingerprint": weights_fingerprint,
            "selection": "last iteration",
            "iterations": iterations,
            "versions": versions(),
            "device": device_name(device),
            "git_commit": git_commit(Path(__file__).parent),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "test_top1": None,
            "val_top1": None,
            "error": None,
        }
        with Display(name, iterations) as display:
            display.start_at(first_iteration)

            def log(line: dict[str, Any]) -> None:
                directory.append_metrics(line)
                display.metrics(line)

            try:
                seconds = train(
                    learner,
                    regularizer,
                    batches,
                    parts.train,
                    config.schedule,
                    first_iteration=first_iteration,
                    seconds_before=seconds_before,
                    evaluate_now=evaluate_now,
                    log=log,
                    checkpoint=lambda done, spent: save_checkpoint(directory, learner, regularizer, done, spent),
                )
            except Diverged as error:
                directory.checkpoint_path.unlink(missing_ok=True)
                directory.write_summary(summary | {"error": str(error), "finished": timestamp()})
                raise

        test = latest["test"]
        _save_arrays(directory.path / "predictions.npz", labels=test["labels"], logits=test["logits"], index=parts.test)
        weights = {key: value.cpu().contiguous() for key, value in target.weights().items()}
        write_atomically(directory.path / "model.safetensors", safetensors_bytes(weights))
        summary |= {
            "test_top1": test["top1"],
            "test_loss": test["loss"],
            "val_top1": latest["val"]["top1"] if "val" in latest else None,
            "val_loss": latest["val"]["loss"] if "val" in latest else None,
            "train_seconds": seconds,
            "images_per_second": iterations * config.schedule.batch_size / seconds,
            "peak_memory_bytes": peak_memory(device),
            "finished": timestamp(),
        }
        directory.write_summary(summary)
        directory.checkpoint_path.unlink(missing_ok=True)
        say(f"{name}: {_accuracies(summary)}, {seconds:.0f} s")
        return summary


def fit_or_reuse(
    regularizer: Regularizer,
    source,
    batches,
    num_classes: int,
    fitted_to: dict[str, Any],
    run_path: Path,
    cache_dir: Path,
) -> None:
    """Call `fit`, unless the same was computed before: every entry of `fitted_to` has to match."""
    metadata = {key: json.dumps(value, sort_keys=True) for key, value in fitted_to.items()}
    key = sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]
    own = run_path / f"{regularizer.fitted_name}.safetensors"
    shared = cache_dir / "fitted" / f"{regularizer.fitted_name}-{key}.safetensors"
    for path in (own, shared):
        fitted = _read_fitted(path, metadata)
        if fitted is not None:
            regularizer.load_fitted(_to(fitted, source))
            break
    else:
        say(f"{run_path.name}: computing {regularizer.fitted_name} ...")
        fitted = {k: v.cpu() for k, v in regularizer.fit(source, batches, num_classes).items()}
        shared.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(shared, safetensors_bytes(fitted, metadata))
    write_atomically(own, safetensors_bytes(fitted, metadata))


def _read_fitted(path: Path, metadata: dict[str, str]) -> dict[str, torch.Tensor] | None:
    """Tensors of a file whose metadata is exactly `metadata`, else None."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != metadata:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError:  # damaged: compute it again
        return None


def _to(tensors: dict[str, torch.Tensor], like: torch.nn.Module) -> dict[str, torch.Tensor]:
    device = next(like.parameters()).device
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def save_checkpoint(
    directory: RunDirectory, learner: Learner, regularizer: Regularizer, done: int, seconds: float
) -> None:
    buffer = io.BytesIO()
    state = {
        "target": learner.target.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "regularizer": regularizer.state_dict(),
        "iterations_done": done,
        "seconds": seconds,
        "metrics_size": directory.metrics_size(),
    }
    torch.save(state, buffer)
    write_atomically(directory.checkpoint_path, buffer.getvalue())


def resume(directory: RunDirectory, learner: Learner, regularizer: Regularizer) -> tuple[int, float]:
    """Go back to the last checkpoint, if there is one: iterations done and seconds spent."""
    if not directory.checkpoint_path.exists():
        directory.truncate_metrics(0)
        return 0, 0.0
    state = torch.load(directory.checkpoint_path, map_location="cpu", weights_only=True)
    learner.target.load_state_dict(state["target"])
    learner.optimizer.load_state_dict(state["optimizer"])
    regularizer.load_state_dict(state["regularizer"])
    directory.truncate_metrics(state["metrics_size"])
    say(f"{directory.path.name}: resuming after iteration {state['iterations_done']}")
    return state["iterations_done"], state["seconds"]


def pick_device(wanted: str) -> torch.device:
    available = torch.cuda.is_available()
    require(wanted != "cuda" or available, "device=cuda, but PyTorch sees no CUDA device; use device=cpu or auto.")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and available) else "cpu")


def pick_precision(wanted: str, device: torch.device) -> str:
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"cpu: {model}, {torch.get_num_threads()} threads"


def reset_peak_memory(device: torch.device) -> None:
    """So that a later job of a sweep does not report the peak of an earlier one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the GPU's allocator, or of the whole process on a CPU (Linux; elsewhere unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def versions() -> dict[str, str]:
    packages = ("delta-transfer", "torch", "torchvision", "numpy", "pillow")
    return {"python": platform.python_version()} | {name.replace("-", "_"): version(name) for name in packages}


def _accuracies(summary: dict[str, Any]) -> str:
    parts = [(part, summary.get(f"{part}_top1")) for part in ("val", "test")]
    return ", ".join(f"{part} top-1 {value:.1f} %" for part, value in parts if value is not None)


def _save_arrays(path: Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
