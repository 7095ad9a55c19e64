"""Measures the processor time of delta-run --help, of a sweep of finished runs, and of delta-report on many records.

    python scripts/bench_startup.py --output FILE.json

The records are those of a search: every method with every seed and every alpha, with made-up accuracies.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import numpy as np

from benchmarking import Report, arguments
from delta_transfer.cli.compose import compose_config
from delta_transfer.engine.devices import versions
from delta_transfer.experiment.lookup import Lookup
from delta_transfer.records.run_directory import SCHEMA, timestamp

METHODS = ("l2", "l2_fe", "l2_sp", "delta_noatt", "delta")
IMAGES, CLASSES = 500, 10  # of predictions
STRENGTH = {"l2": "weight_decay", "l2_fe": "weight_decay"}  # what is searched; of the others alpha


def main() -> None:
    options = arguments("Measure how long delta-run --help, finished sweeps and delta-report take.")
    report = Report(options)
    times = 1 if options.quick else 2
    seconds = best_of(times, "delta-run", "--help")
    report.add("startup_help", seconds, f"processor seconds of delta-run --help; best of {times}")
    few, many = (1, 2) if options.quick else (10, 300)
    with tempfile.TemporaryDirectory() as folder:
        words = write_finished(folder, many)
        of_few, of_many = (best_of(times, "delta-run", "-m", *words, f"seed=range({n})") for n in (few, many))
    what = f"delta-run, {few} finished runs: {of_few:.1f} processor seconds, {many}: {of_many:.1f}; best of {times}"
    report.add("startup_finished", of_many, what)
    report.add("startup_finished_run", max(0.001, 1000 * (of_many - of_few) / (many - few)), what)
    page = ["--format", "html", "--output", "page.html"]
    for key, seeds, strengths, words, images in (
        ("startup_report", 10, 20, [], 0),
        ("startup_report_3000", 10, 60, [], 0),
        ("startup_page_3000", 10, 60, page, 0),
        ("startup_report_predictions", 10, 60, [], IMAGES),
        ("startup_page_predictions", 10, 60, page, IMAGES),
    ):
        if options.quick:
            seeds, strengths = 2, 2
        with tempfile.TemporaryDirectory() as folder:
            count = write_records(Path(folder), seeds, strengths, 90 if words else 0, images)
            where = [str(Path(folder) / word) if word == "page.html" else word for word in words]
            seconds = best_of(times, "delta-report", folder, *where)
        shown = " ".join(["delta-report", *words[:2]])
        what = f"{count:,} records" + (f" with logits of {images} images" if images else "")
        report.add(key, seconds, f"processor seconds of {shown} on {what}; best of {times}")
    report.write()


def write_finished(folder: str, count: int) -> list[str]:
    """Trains one run of the embedded letters, and copies it to the names of other seeds; returns the sweep's words."""
    words = ["dataset=glyphs", "reg=l2", "schedule.iterations=1", f"results_dir={folder}", f"cache_dir={folder}/cache"]
    best_of(1, "delta-run", *words)
    lookup, config = Lookup(), compose_config("config", words)
    paths = [lookup.find(config.replace(seed=seed)).directory.path for seed in range(count)]
    for path in paths[1:]:
        shutil.copytree(paths[0], path)
    return words


def write_records(folder: Path, seeds: int, strengths: int, lines: int, images: int = 0) -> int:
    """Writes records, each with `lines` lines of metrics and predictions for `images`; returns their number."""
    metrics = [
        {"step": step, "lr": 0.01, "cross_entropy": 30 / step, "loss": 30 / step, "images_per_second": 190.0}
        for step in range(100, 100 * lines + 1, 100)
    ]
    records = list(synthetic_records(seeds, strengths))
    draw = np.random.default_rng(0)
    labels = draw.integers(0, CLASSES, images)
    for record in records:
        run = folder / "runs" / record["run_id"]
        run.mkdir(parents=True)
        if images:
            logits = draw.normal(size=(images, CLASSES)).astype(np.float32)
            np.savez(run / "predictions.npz", labels=labels, logits=logits, index=np.arange(images))
            record |= {"n_test": images, "test_top1": 100 * float((logits.argmax(axis=1) == labels).mean())}
        (run / "summary.json").write_text(json.dumps(record, indent=2))
        if lines:
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return len(records)


def best_of(times: int, command: str, *words: str) -> float:
    """Processor seconds of the shortest run, since other work on the machine only adds time."""
    found = []
    for _ in range(times):
        before = getrusage(RUSAGE_CHILDREN)
        subprocess.run([Path(sys.executable).with_name(command), *words], check=True, capture_output=True)
        after = getrusage(RUSAGE_CHILDREN)
        found.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(found)


def synthetic_records(seeds: int, strengths: int) -> Iterator[dict]:
    """Records as runs write them."""
    draw = random.Random(0)
    about = {"schema": SCHEMA, "versions": versions(), "device": "cuda: NVIDIA H200", "git_commit": "0123456789ab"}
    about |= {"n_train": 5994, "n_val": 0, "n_test": 5794, "num_classes": 200, "selection": "last iteration"}
    about |= {"dataset_fingerprint": "0" * 64, "weights_fingerprint": "1" * 64, "iterations": 9000, "error": None}
    for method in METHODS:
        overrides = ["dataset=cub", "backbone=resnet101", f"reg={method}"]
        config = asdict(compose_config("config", overrides))
        key = STRENGTH.get(method, "alpha")
        for power, seed in product(range(strengths), range(seeds)):
            strength = 10 ** (power / 4 - 4)
            own = config | {"seed": seed, "reg": config["reg"] | {key: strength}}
            yield about | {
                "run_id": f"cub-resnet101-{method}-s{seed}-{power:08x}",
                "config": own,
                "seed": seed,
                "command": f"delta-run -m {' '.join(overrides)} reg.{key}={strength}",
                "overrides": [*overrides, f"reg.{key}={strength}", f"seed={seed}"],
                "test_top1": draw.gauss(80, 1),
                "val_top1": None,
                "test_loss": draw.gauss(1, 0.1),
                "train_seconds": draw.gauss(3000, 100),
                "images_per_second": draw.gauss(190, 5),
                "peak_memory_bytes": 12_000_000_000,
                "finished": timestamp(),
            }


if __name__ == "__main__":
    main()
