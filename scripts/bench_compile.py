"""Measures the gain of compile=true and cuda_graph=true for a training step, and after how many steps the first pays.

python scripts/bench_compile.py         with --device cpu | cuda, --output FILE
"""

from time import perf_counter

from bench_step import step_of
from benchmarking import Report, arguments, side_by_side
from delta_transfer.engine.graphed_step import GraphedStep


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
        if not cuda:
            report.add(f"graph_{method}", None, "there is no GPU")
            continue
        replayed = step_of(method, name, batch, size, options.device, precision, step=GraphedStep())
        ratio = side_by_side({"eager": eager, "replayed": replayed}, options.device, rounds, warm_up=3).ratio(
            "eager", "replayed"
        )
        report.add(f"graph_{method}", ratio.value, f"{name}, {size} px, batch {batch}, {precision}; {ratio}")
    report.write()


if __name__ == "__main__":
    main()
