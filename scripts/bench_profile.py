"""Measures where the time of one DELTA training step goes.

python scripts/bench_profile.py         with --device cpu | cuda, --output FILE
"""

from time import perf_counter, process_time

import torch

from bench_step import state_of
from benchmarking import Report, arguments


def main() -> None:
    options = arguments(__doc__.splitlines()[0], one_thread=True)
    cuda = options.device.type == "cuda"
    report = Report(options)
    name, batch, size, rounds = ("resnet18", 2, 32, 2) if options.quick else ("resnet50", 64 if cuda else 16, 224, 5)
    precision = "bf16" if cuda else "fp32"
    clock = perf_counter if cuda else process_time
    state, method, held = state_of("delta", name, batch, size, options.device, precision)

    def step() -> dict[str, float]:
        """engine.loop.train_step, with the clock between its parts."""
        marks = {"": now(clock, options.device)}
        outputs = state.forward(held.images)
        marks["forward of the target"] = now(clock, options.device)
        source_outputs = state.forward_source(held.images)
        marks["forward of the source"] = now(clock, options.device)
        losses = state.task_loss(outputs, held.labels) | method.penalty(state.target, outputs, source_outputs)
        loss = sum(losses.values())
        marks["losses"] = now(clock, options.device)
        del outputs, source_outputs
        loss.backward()
        marks["backward"] = now(clock, options.device)
        state.optimizer_step()
        marks["optimizer"] = now(clock, options.device)
        names = list(marks)
        return {name: marks[name] - marks[before] for before, name in zip(names, names[1:], strict=False)}

    step()
    taken = [step() for _ in range(rounds)]
    fastest = {phase: min(times[phase] for times in taken) for phase in taken[0]}
    total = sum(fastest.values())
    what = f"{name}, {size} px, batch {batch}, {precision}"
    for phase, seconds in fastest.items():
        key = f"profile_{phase.split()[-1]}"
        report.add(key, 100 * seconds / total, f"% of {1000 * total:.0f} ms: {phase}; {what}")
    report.write()


def now(clock, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock()


if __name__ == "__main__":
    main()
