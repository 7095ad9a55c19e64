"""Measures the gain of compile=true and cuda_graph=true for a training step, and after how many steps the first pays.

python scripts/bench_compile.py         with --device cpu | cuda, --output FILE
"""

from time import perf_counter

import torch

from bench_step import PlainDelta, step_of
from benchmarking import Report, arguments, side_by_side
from delta_transfer.engine.graphed_step import GraphedStep

METHODS = ("l2", "l2_sp", "delta")
GRAPH_ROWS = (
    *(f"graph_{method}" for method in METHODS),
    *("graph_l2_sp_to_l2", "graph_delta_to_l2", "graph_rate", "graph_plain"),
)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], one_thread=True)
    cuda = options.device.type == "cuda"
    report = Report(options)
    name, batch, size, rounds = ("resnet50", 64, 224, 5) if cuda else ("resnet18", 32, 128, 5)
    if options.quick:
        name, batch, size, rounds = "resnet18", 2, 32, 1
    precision = "bf16" if cuda else "fp32"
    for method in ("delta",) if options.quick else ("l2", "delta"):
        eager = step_of(method, name, batch, size, options.device, precision)
        compiled = step_of(method, name, batch, size, options.device, precision, compiled=True)
        eager()
        start = perf_counter()
        compiled()
        overhead = perf_counter() - start
        times = side_by_side({"eager": eager, "compiled": compiled}, options.device, rounds)
        ratio = times.ratio("eager", "compiled")
        gained = times.seconds("eager") - times.seconds("compiled")
        pays = f"pays after {overhead / gained:,.0f} steps" if gained > 0 else "never pays"
        what = f"{name}, {size} px, batch {batch}, {precision}; first step {overhead:.0f} s, {pays}; {ratio}"
        report.add(f"compile_{method}", ratio.value, what)
    if cuda:
        add_graphs(report, name, batch, size, rounds, options.device)
    else:
        for key in GRAPH_ROWS:
            report.add(key, None, "there is no GPU")
    report.write()


def add_graphs(report: Report, name: str, batch: int, size: int, rounds: int, device: torch.device) -> None:
    """Adds the gain of a replayed step for each method, and its cost beside other replayed steps and a plain one."""
    works = {}
    for method in METHODS:
        works[f"{method} launched"] = step_of(method, name, batch, size, device, "bf16")
        works[method] = step_of(method, name, batch, size, device, "bf16", step=GraphedStep())
    times = side_by_side(works, device, rounds, warm_up=3)
    what = f"{name}, {size} px, batch {batch}, bf16, {rounds} rounds"
    for method in METHODS:
        ratio = times.ratio(f"{method} launched", method)
        report.add(f"graph_{method}", ratio.value, f"{what}; {ratio}")
    for method in METHODS[1:]:
        ratio = times.ratio(method, "l2")
        report.add(f"graph_{method}_to_l2", ratio.value, f"{what}, both replayed; {ratio}")
    report.add("graph_rate", batch / times.seconds("l2"), f"{what}, replayed, the fastest round")
    steps = {"plain": PlainDelta(name, batch, size, device).step, "delta": works["delta"]}
    ratio = side_by_side(steps, device, rounds).ratio("plain", "delta")
    report.add("graph_plain", ratio.value, f"{what}, ours replayed; plain in fp32, NCHW; {ratio}")


if __name__ == "__main__":
    main()
