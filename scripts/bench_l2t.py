"""Measures a step of L2T-ww as a multiple of a plain step of the same target, and where its time goes.

    python scripts/bench_l2t.py             with --device cpu | cuda, --output FILE

Every pair of taps is matched, and two inner steps are tried. Besides the time, the arithmetic (convolutions and matrix
products) is counted. The published scheme needs 5 passes forward and backward of the target and 3 backward through a
backward pass; here the first of those three goes only to the meta-networks. On a GPU the look-ahead is replayed as a
CUDA graph, except when its parts are timed.
"""

from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from time import perf_counter, process_time
from unittest.mock import patch

import torch

from bench_profile import now
from bench_step import batch_of, count_flops
from benchmarking import Report, arguments, side_by_side
from delta_transfer.cli.sources import named_backbone
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import ScheduleConfig, SGDConfig, make_optimizer
from delta_transfer.methods import l2t_ww, look_ahead
from delta_transfer.methods.base import Batch, Regularizer
from delta_transfer.methods.l2 import L2
from delta_transfer.models.sources import SourceNetwork, frozen, shapes_of
from delta_transfer.models.zoo import build_source

PAIRS = {"vgg9_bn": "resnet32", "small_vgg": "small_resnet"}  # target: source
SIZE, LR = 32, 0.01


def main() -> None:
    options = arguments(__doc__.splitlines()[0], one_thread=True)
    cuda = options.device.type == "cuda"
    report = Report(options)
    pairs = {"small_vgg": "small_resnet"} if options.quick else PAIRS
    batch, rounds = (4, 2) if options.quick else (128, 5) if cuda else (32, 5)
    for target, source in pairs.items():
        # alpha: so weak that random weights do not diverge; the cost does not depend on it.
        methods = {"plain": L2(), "l2t_ww": l2t_ww.L2TWW(alpha=1e-3)}
        works = {name: state_of(method, target, source, batch, options.device) for name, method in methods.items()}
        steps = {name: partial(train_step, *work) for name, work in works.items()}
        counts = {name: count_flops(step) for name, step in steps.items()}  # first, since a replay is not counted
        times = side_by_side(steps, options.device, rounds, warm=True)
        ratio = times.ratio("l2t_ww", "plain")
        seconds = ", ".join(f"{name} {1000 * times.seconds(name):.0f} ms" for name in steps)
        what = f"{target} learns from {source}, {SIZE} px, batch {batch}, fp32"
        report.add(f"l2t_{target}", ratio.value, f"{what}; {seconds}; {ratio}")
        amounts = ", ".join(f"{name} {count / 1e9:.2f} GFLOP" for name, count in counts.items())
        report.add(f"l2t_arithmetic_{target}", counts["l2t_ww"] / counts["plain"], f"{what}; {amounts}")
        methods["l2t_ww"].replayed.refused = True  # a CUDA graph has no parts to time
        where(report, target, *works["l2t_ww"], options.device, what)
    report.write()


def state_of(
    method: Regularizer, target_name: str, source_name: str, batch: int, device: torch.device
) -> tuple[TrainState, Regularizer, Batch]:
    """A method at the start of training, as a run sets it up, with random weights, and a random batch."""
    ours, theirs = (named_backbone(name).replace(weights="none") for name in (target_name, source_name))
    target = build_source(ours, 0).with_new_head(50, 0).to(device, memory_format=torch.channels_last).train()
    sources = [SourceNetwork(source_name, theirs, build_source(theirs, 1).freeze(), fingerprint="")]
    method.setup(target, target.map_shapes(batch, SIZE, True), shapes_of(sources, batch, SIZE, with_logits=False))
    method.to(device)
    maps = None
    if method.needs.source:
        maps = frozen(sources, ours, False, "fp32").to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(target, method, SGDConfig(), ScheduleConfig(iterations=1, lr=LR))
    return TrainState(target, maps, optimizer, "fp32"), method, Batch(*batch_of(batch, SIZE, device))


def where(
    report: Report, target: str, state: TrainState, method: Regularizer, batch: Batch, device: torch.device, what: str
) -> None:
    """Shares of a step: the parts that are functions of their own, and the rest."""
    taken: dict[str, float] = {}
    clock = perf_counter if device.type == "cuda" else process_time
    rounds = []
    with ExitStack() as stack:
        for owner, name, phase in (
            (state, "forward_source", "source"),
            (l2t_ww, "forward_with", "forward"),
            (look_ahead, "grad", "backward"),
            (look_ahead, "_through", "double"),
            (method, "meta_step", "meta_step"),
        ):
            stack.enter_context(timed(owner, name, phase, taken, clock, device))
        for _ in range(3):
            taken.clear()
            begun = now(clock, device)
            train_step(state, method, batch)
            rounds.append(taken | {"step": now(clock, device) - begun})
    best = min(rounds, key=lambda phases: phases["step"])
    best["kept"] = best["step"] - best["source"] - best["meta_step"]
    best["backward"] -= best["double"]  # which also calls `grad`
    best["rest"] = best["meta_step"] - best["forward"] - best["backward"] - best["double"]
    for phase in ("source", "kept", "forward", "backward", "double", "rest"):
        share = 100 * best[phase] / best["step"]
        report.add(f"l2t_{target}_{phase}", share, f"% of {1000 * best['step']:.0f} ms; {what}")


@contextmanager
def timed(owner, name: str, phase: str, taken: dict[str, float], clock, device: torch.device):
    """Adds the time of every call of `owner`'s `name` to `taken[phase]`."""
    work = getattr(owner, name)

    @wraps(work)
    def measured(*args, **kwargs):
        begun = now(clock, device)
        result = work(*args, **kwargs)
        taken[phase] = taken.get(phase, 0.0) + now(clock, device) - begun
        return result

    with patch.object(owner, name, measured):
        yield


if __name__ == "__main__":
    main()
