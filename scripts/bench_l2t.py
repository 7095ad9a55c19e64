"""A step of L2T-ww as a multiple of a plain step of the same target, and where its time goes.

    python scripts/bench_l2t.py             with --device cpu | cuda, --output FILE

Every pair of taps is matched, two inner steps are tried. The arithmetic (convolutions and matrix products, counted, not
timed) is given beside the time. The published scheme needs 5 passes forward and backward of the target and 3 backward
through a backward pass; here the first of those three goes to the meta-networks alone. On a GPU the look-ahead is
replayed as a CUDA graph, except where its parts are timed.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from time import perf_counter, process_time
from unittest.mock import patch

import torch

from bench_profile import now
from bench_step import batch_of, count_flops
from benchmarking import Report, arguments, side_by_side
from delta_transfer.config import ScheduleConfig
from delta_transfer.engine.loop import TrainState, make_optimizer
from delta_transfer.experiment.sources import Loaded, frozen, named_backbone, shapes_of
from delta_transfer.methods import L2, L2TWW, Regularizer, look_ahead
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
        methods = {"plain": L2(), "l2t_ww": L2TWW(alpha=1e-3)}
        works = {
            name: (method, *learner_of(method, target, source, batch, options.device))
            for name, method in methods.items()
        }
        steps = {name: step_of(*work) for name, work in works.items()}
        counts = {name: count_flops(step) for name, step in steps.items()}  # first: what is replayed is not counted
        times = side_by_side(steps, options.device, rounds, warm=True)
        ratio = times.ratio("l2t_ww", "plain")
        seconds = ", ".join(f"{name} {1000 * times.seconds(name):.0f} ms" for name in steps)
        what = f"{target} learns from {source}, {SIZE} px, batch {batch}, fp32"
        report.add(f"l2t_{target}", ratio.value, f"{what}; {seconds}; {ratio}")
        amounts = ", ".join(f"{name} {count / 1e9:.2f} GFLOP" for name, count in counts.items())
        report.add(f"l2t_arithmetic_{target}", counts["l2t_ww"] / counts["plain"], f"{what}; {amounts}")
        method, *rest = works["l2t_ww"]
        method.replayed.refused = True  # of a CUDA graph there are no parts to time
        where(report, target, method, *rest, options.device, what)
    report.write()


def learner_of(
    method: Regularizer, target_name: str, source_name: str, batch: int, device: torch.device
) -> tuple[TrainState, torch.Tensor, torch.Tensor]:
    """A method at the start of training as a run sets it up, both networks with random weights, and a random batch."""
    ours, theirs = (replace(named_backbone(name), weights="none") for name in (target_name, source_name))
    target = build_source(ours, 0).with_new_head(50, 0).to(device, memory_format=torch.channels_last).train()
    sources = [Loaded(source_name, theirs, build_source(theirs, 1).freeze(), fingerprint="")]
    method.start(target, target.map_shapes(batch, SIZE, True), shapes_of(sources, batch, SIZE, with_logits=False))
    method.to(device)
    maps = None
    if method.needs_source:
        maps = frozen(sources, ours, False, "fp32").to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(target, method, ScheduleConfig(iterations=1, lr=LR))
    return TrainState(target, maps, optimizer, "fp32"), *batch_of(batch, SIZE, device)


def step_of(
    method: Regularizer, learner: TrainState, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], object]:
    return lambda: method.update(learner, images, labels)


def where(report: Report, target: str, method, learner, images, labels, device: torch.device, what: str) -> None:
    """Shares of a step: the parts that are functions of their own, and what is left of it."""
    taken: dict[str, float] = {}
    clock = perf_counter if device.type == "cuda" else process_time
    rounds = []
    with ExitStack() as stack:
        for owner, name, phase in (
            (learner, "forward_source", "source"),
            (method, "step_on", "kept"),
            (learner, "forward_with", "forward"),
            (look_ahead, "grad", "backward"),
            (look_ahead, "_through", "double"),
            (method, "meta_step", "meta_step"),
        ):
            stack.enter_context(timed(owner, name, phase, taken, clock, device))
        for _ in range(3):
            taken.clear()
            method.update(learner, images, labels)
            rounds.append(dict(taken))
    best = min(rounds, key=lambda phases: sum(phases[key] for key in ("source", "kept", "meta_step")))
    total = best["source"] + best["kept"] + best["meta_step"]
    best["backward"] -= best["double"]  # which is made of `grad` too
    best["rest"] = best["meta_step"] - best["forward"] - best["backward"] - best["double"]
    for phase in ("source", "kept", "forward", "backward", "double", "rest"):
        report.add(f"l2t_{target}_{phase}", 100 * best[phase] / total, f"% of {1000 * total:.0f} ms; {what}")


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
