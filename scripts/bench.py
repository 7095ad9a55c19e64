"""All benchmarks, one after the other, and the table of targets: `make bench`.

    python scripts/bench.py                 --device auto | cpu | cuda   --only step,attention   --again

Each part writes its rows to results/published/benchmarks/<device>/<part>.json. The table has all rows that are there,
including those of a GPU from another day. A part that is there for this machine and commit is not repeated, so that an
interrupted benchmark goes on where it stopped; --again repeats all parts.
"""

import argparse
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench_step import LATER
from benchmarking import commit_of_code
from delta_transfer.engine.devices import device_name
from delta_transfer.records.files import write_atomically

SCRIPTS = Path(__file__).parent
RESULTS = SCRIPTS.parent / "results" / "published" / "benchmarks"
PARTS = ("step", "profile", "memory", "input", "attention", "evaluation", "startup", "growth", "busy", "compile", "l2t")
DEVICES = ("cpu", "cuda")
TITLES = {"cpu": "CPU", "cuda": "GPU"}


PHASES = {
    "target": "forward of the target",
    "source": "forward of the source",
    "losses": "losses",
    "backward": "backward",
    "optimizer": "optimizer",
}

L2T_TARGETS = ("vgg9_bn", "small_vgg")
L2T_PHASES = {
    "source": "forward of the source",
    "kept": "the step that is kept",
    "forward": "4 tried forward passes",
    "backward": "4 backward passes",
    "double": "3 backward through a backward pass",
    "rest": "the rest: matchers, SGD, adjoints, Adam",
}


@dataclass(frozen=True)
class Target:
    """The target of a row on a CPU and a GPU: an upper bound, or a lower one with `at_least`; None: no target.

    before: what an earlier version took, on another machine. A row may have its own, measured beside it.
    """

    key: str
    what: str
    cpu: float | None = None
    cuda: float | None = None
    at_least: bool = False
    before: float | None = None


GROWTH = {
    "images": "images: reading the list of a folder",
    "classes": "classes: a training step",
    "runs": "runs: comparing their records",
    "channels": "channels: exact attention",
}


def of_networks(key: str, what: str, *bounds: float | None, at_least: bool = False) -> list[Target]:
    named = {"resnet50": "ResNet-50", "resnet101": "ResNet-101"}
    return [Target(f"{key}_{name}", f"{what}, {title}", *bounds, at_least=at_least) for name, title in named.items()]


TARGETS = [
    *of_networks("step_l2_sp", "step: L2-SP / L2", 1.03, 1.03),
    *of_networks("step_delta_noatt", "step: DELTA w/o ATT / L2", 1.30, 1.25),
    *of_networks("step_delta", "step: DELTA / L2", 1.30, 1.25),
    *of_networks("step_plain", "step: plain DELTA / ours", 1.25, 3.0, at_least=True),
    Target("step_bf16", "step: fp32 / bf16, DELTA", at_least=True),
    *of_networks("step_rate", "step: L2's arithmetic, % of a matrix product's rate"),
    *of_networks("step_l2_fe", "step: L2-FE / a bare forward pass", 1.05, 1.05),
    *(Target(f"step_{key}_resnet50", f"step: {what} / L2, ResNet-50") for key, (what, _) in LATER.items()),
    *(Target(f"profile_{key}", f"DELTA step: {what}, %") for key, what in PHASES.items()),
    Target("memory_delta", "peak memory of a step: DELTA / L2", 1.25, 1.25),
    Target("memory_delta_replayed", "peak memory of a step: DELTA / L2, both replayed as CUDA graphs", cuda=1.25),
    Target("input_training", "training from the store / on one batch in memory", 0.97, 0.97, at_least=True),
    Target("input_dataloader", "images/s: store / DataLoader over JPEG", 10, 10, at_least=True),
    Target("input_store", "a pass of that DataLoader / building the store", 1, 1, at_least=True),
    Target("attention_multiply_adds", "attention: multiply-adds, plain / ours, ResNet-101", 5, 5, at_least=True),
    Target("attention_time", "attention: time, plain / ours, ResNet-101", 8, 8, at_least=True),
    Target("attention_agreement", "attention: rank correlation, ours and plain", 0.999, 0.999, at_least=True),
    Target("attention_taylor", "attention: rank correlation, first-order and exact"),
    Target("evaluation_forward", "evaluation / a bare forward pass", 1.05, 1.05),
    Target("evaluation_ten_crops", "evaluation of ten crops / ten times one crop", 1.05, 1.05),
    Target("startup_help", "processor seconds of delta-run --help", 2.5, 2.5),
    Target("startup_finished", "processor seconds of delta-run on 300 finished runs", 15),
    Target("startup_finished_run", "processor milliseconds of each further finished run", 50, before=135),
    Target("startup_report", "processor seconds of delta-report on 1,000 runs", 2.5, 2.5),
    Target("startup_report_3000", "processor seconds of delta-report on 3,000 runs", 5, 5),
    Target("startup_page_3000", "processor seconds of its page for 3,000 runs", 15, 15),
    Target(
        "startup_report_predictions", "processor seconds of delta-report on 3,000 runs, logits too", 5, 5, before=2.3
    ),
    Target("startup_page_predictions", "processor seconds of its page for 3,000 runs, logits too", 15, 15, before=30),
    *(Target(f"growth_{key}", f"exponent of the cost with the number of {what}") for key, what in GROWTH.items()),
    *(Target(f"l2t_{name}", f"step: L2T-ww / plain, {name}", 8, 8) for name in L2T_TARGETS),
    *(Target(f"l2t_arithmetic_{name}", f"arithmetic: L2T-ww / plain, {name}", 11, 11) for name in L2T_TARGETS),
    *(
        Target(f"l2t_{name}_{key}", f"L2T-ww step, {name}: {what}, %")
        for name in L2T_TARGETS
        for key, what in L2T_PHASES.items()
    ),
    *(
        Target(f"busy_{count}_{name}", f"{name}, {what}", 0.97 if count == 0 else 0.6, at_least=True)
        for name in ("small_resnet", "resnet18", "resnet50")
        for count, what in (
            (0, "alone: speed / as PyTorch has it"),
            (2, "2 busy programs beside it: speed / fair share"),
            (6, "6 busy programs beside it: speed / fair share"),
        )
    ),
    Target("compile_l2", "L2 step: eager / compile=true"),
    Target("compile_delta", "DELTA step: eager / compile=true"),
    *(
        Target(f"graph_{key}", f"{what} step: launched / replayed as a CUDA graph", at_least=True)
        for key, what in (("l2", "L2"), ("l2_sp", "L2-SP"), ("delta", "DELTA"))
    ),
    Target("graph_l2_sp_to_l2", "step: L2-SP / L2, both replayed as CUDA graphs", cuda=1.03),
    Target("graph_delta_to_l2", "step: DELTA / L2, both replayed as CUDA graphs", cuda=1.25),
    Target("graph_plain", "step: plain DELTA / ours, replayed as a CUDA graph", cuda=3.0, at_least=True),
    Target("graph_rate", "L2 step replayed as a CUDA graph: images/s", cuda=5000, at_least=True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=("auto", *DEVICES))
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--again", action="store_true", help="repeat parts that are there already")
    options = parser.parse_args()
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if kind == "cuda" else device_name(torch.device("cpu")).split(",")[0]
    commit, failed = commit_of_code(), []
    for part in options.only.split(","):
        output = RESULTS / kind / f"{part}.json"
        if not options.again and output.exists() and commit and not commit.endswith("-dirty"):
            done = json.loads(output.read_text())
            if done["commit"] == commit and machine in done["machine"]:
                print(f"{part}: is there already ({done['date']})")
                continue
        script = [sys.executable, str(SCRIPTS / f"bench_{part}.py"), "--device", kind, "--output", str(output)]
        if subprocess.run(script, cwd=SCRIPTS.parent).returncode:
            failed.append(part)
    parts = {
        kind: [json.loads(path.read_text()) | {"part": path.stem} for path in sorted((RESULTS / kind).glob("*.json"))]
        for kind in DEVICES
    }
    write_atomically(RESULTS / "README.md", markdown(parts).encode())
    show(kind, parts[kind])
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def row(target: Target, kind: str, parts: list[dict]) -> tuple[str, str, str, str, str]:
    """Target, value before, measured value, verdict and detail on one device; a dash if nothing was measured."""
    bound = getattr(target, kind)
    wanted = "" if bound is None else f"{'≥' if target.at_least else '≤'} {bound:g}"
    measured = next((part["rows"][target.key] for part in parts if target.key in part["rows"]), None)
    if measured is None or measured["value"] is None:
        return wanted, "", "-", "", "" if measured is None else measured["detail"]
    before = measured.get("before", target.before)
    value = measured["value"]
    held = bound is None or (value >= bound if target.at_least else value <= bound)
    earlier = "" if before is None else f"{before:.3g}"
    verdict = "" if bound is None else "passes" if held else "falls short"
    return wanted, earlier, f"{value:.3g}", verdict, measured["detail"]


def show(kind: str, parts: list[dict]) -> None:
    """Shows the measured rows of one kind of device on the terminal."""
    table = Table("what", "before", TITLES[kind], "target")
    for target in TARGETS:
        wanted, before, value, verdict, _ = row(target, kind, parts)
        if value != "-":
            shown = f"{value} [red]{verdict}[/]" if verdict == "falls short" else value
            table.add_row(target.what, before, shown, wanted)
    Console().print(table)


def markdown(parts: dict[str, list[dict]]) -> str:
    lines = ["# Benchmarks", "", "`make bench`: ratios taken side by side in one process, and what they should be.", ""]
    lines += textwrap.wrap(
        "Parentheses have, in rows beside busy programs, the same with PyTorch's own setting, measured in turn "
        "with ours. In other rows they have what an earlier version took on another machine.",
        120,
    )
    lines.append("")
    for kind, title in TITLES.items():
        lines += machine_of(title, parts[kind])
    lines += [
        "| what | target CPU | CPU | | target GPU | GPU | |",
        "| --- | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for target in TARGETS:
        cells = []
        for kind in DEVICES:
            wanted, before, value, verdict, _ = row(target, kind, parts[kind])
            cells += [wanted, f"{value} (before: {before})" if before else value, verdict]
        lines.append(f"| {' | '.join([target.what, *cells])} |")
    for kind, title in TITLES.items():
        if parts[kind]:
            lines += ["", f"## How it was measured on the {title}", ""]
            lines += [
                f"- {target.what}: {detail}" for target in TARGETS if (detail := row(target, kind, parts[kind])[4])
            ]
    return "\n".join(lines) + "\n"


def machine_of(title: str, parts: list[dict]) -> list[str]:
    if not parts:
        return [f"{title}: not measured; no such machine was at hand.", ""]
    by_machine: dict[str, list[dict]] = {}
    for part in parts:
        machine = f"{part['machine'].split(',')[0].split(': ', 1)[1]}, {versions_of(part)}"
        by_machine.setdefault(machine, []).append(part)
    lines = []
    for machine, its_parts in sorted(by_machine.items()):
        commits = sorted({str(part["commit"]) for part in its_parts})
        made = f"parts {', '.join(part['part'] for part in its_parts)}; commits {', '.join(commits)}"
        lines += textwrap.wrap(f"- {title}: {machine}; {made}", 120, subsequent_indent="  ")
    return [*lines, ""]


def versions_of(part: dict) -> str:
    kept = ("python", "torch", "torchvision")
    return ", ".join(f"{name} {part['versions'][name]}" for name in kept)


if __name__ == "__main__":
    main()
