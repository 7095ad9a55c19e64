"""Compares a training step of each method with L2's and with a plain implementation of DELTA.

    python scripts/bench_step.py            with --device cpu | cuda, --output FILE

One process times all of them in turn on the same random images. On a CPU this is the processor time of one thread,
since that of several threads contains waiting. The plain implementation does what the published code does, and was
written for this comparison: hooks that collect into lists, a loop over parameters, `.item()` in every step, NCHW, a
full forward pass of the source network, and PyTorch's default precision.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from benchmarking import Report, arguments, side_by_side
from delta_transfer.common.timing import seconds_of
from delta_transfer.engine.averages.ema import EMA, EMAConfig
from delta_transfer.engine.callbacks import Average, AverageConfig
from delta_transfer.engine.loop import Step, TrainState, train_step
from delta_transfer.engine.optimizers import ScheduleConfig, SGDConfig, make_optimizer
from delta_transfer.methods.base import Batch, Regularizer
from delta_transfer.methods.delta import DELTA, DELTAWithoutAttention
from delta_transfer.methods.l2 import L2, L2FE
from delta_transfer.methods.l2_sp import L2SP
from delta_transfer.methods.ldifs import LDIFS
from delta_transfer.methods.lora import LoRA
from delta_transfer.methods.partial_tuning import BitFit, LNTune
from delta_transfer.methods.spd import SPD
from delta_transfer.models import Network, frozen_maps

TAPS = {
    "resnet18": ["layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2"],
    "resnet50": ["layer1.2.conv3", "layer2.3.conv3", "layer3.5.conv3", "layer4.2.conv3"],
    "resnet101": ["layer1.2.conv3", "layer2.3.conv3", "layer3.22.conv3", "layer4.2.conv3"],
}
CLASSES, ALPHA = 50, 1e-6  # so weak that random weights do not diverge; the cost does not depend on it
PAPERS = {
    "l2": L2,
    "l2_sp": partial(L2SP, ALPHA),
    "delta_noatt": partial(DELTAWithoutAttention, ALPHA),
    "delta": partial(DELTA, ALPHA),
}
LATER = {  # with a title; average=wise does nothing in a step
    "delta_every_2": ("DELTA in every 2nd step", partial(DELTA, ALPHA, every=2)),
    "delta_every_4": ("DELTA in every 4th step", partial(DELTA, ALPHA, every=4)),
    "delta_every_8": ("DELTA in every 8th step", partial(DELTA, ALPHA, every=8)),
    "delta_normalize_maps": ("DELTA, normalised maps", partial(DELTA, ALPHA, normalize_maps=True)),
    "ldifs": ("LDIFS", partial(LDIFS, ALPHA)),
    "spd": ("SPD", SPD),
    "l2_sp_decoupled": ("L2-SP, decoupled", partial(L2SP, ALPHA, decoupled=True)),
    "lora": ("LoRA", LoRA),
    "bitfit": ("BitFit", BitFit),
    "ln_tune": ("LN-tune", LNTune),
    "layer_decay": ("L2 with layer-wise learning rates", L2),
    "ema": ("L2 with average=ema", L2),
}
METHODS = PAPERS | {"l2_fe": L2FE} | {name: make for name, (_, make) in LATER.items()}


def main() -> None:
    options = arguments(__doc__.splitlines()[0], one_thread=True)
    cuda = options.device.type == "cuda"
    report = Report(options)
    networks = ["resnet18"] if options.quick else ["resnet50", "resnet101"]
    batch, size, rounds = (2, 32, 2) if options.quick else (64, 224, 5) if cuda else (16, 224, 3)
    for name in networks:
        fewer = 2 if name == "resnet101" and not cuda else rounds  # a round takes two minutes
        time_steps(report, name, batch, size, fewer, options.device)
    precision(report, networks[0], batch, size, rounds, options.device)
    report.write()


def time_steps(report: Report, name: str, batch: int, size: int, rounds: int, device: torch.device) -> None:
    """Adds a row with the ratio of each method's step, and of the plain implementation's."""
    fast = "bf16" if device.type == "cuda" else "fp32"
    what = f"{name}, {size} px, batch {batch}, {fast}, {rounds} rounds; "
    steps = {method: step_of(method, name, batch, size, device, fast) for method in PAPERS}
    times = side_by_side(steps, device, rounds, warm=True)
    for method in ("l2_sp", "delta_noatt", "delta"):
        ratio = times.ratio(method, "l2")
        report.add(f"step_{method}_{name}", ratio.value, what + str(ratio))
    report_rate(report, name, steps["l2"], times.seconds("l2"), batch, device, fast)
    del steps["l2_sp"], steps["delta_noatt"], steps["l2"]  # few at a time: memory that lies idle goes cold
    steps["plain"] = PlainDelta(name, batch, size, device).step
    ratio = side_by_side(steps, device, rounds).ratio("plain", "delta")
    report.add(f"step_plain_{name}", ratio.value, f"{what}plain in fp32, NCHW; {ratio}")
    steps = {
        "l2_fe": step_of("l2_fe", name, batch, size, device, fast),
        "forward": forward_of(name, batch, size, device, fast),
    }
    fe_times = side_by_side(steps, device, rounds)
    of_l2 = f"{fe_times.seconds('l2_fe') / times.seconds('l2'):.2f} of an L2 step"
    ratio = fe_times.ratio("l2_fe", "forward")
    report.add(f"step_l2_fe_{name}", ratio.value, f"{what}{ratio}; {of_l2}")
    if name == "resnet101":  # which would take half an hour more
        return
    for method in LATER:  # two at a time, since each has a network of its own
        steps = {kind: step_of(kind, name, batch, size, device, fast) for kind in ("l2", method)}
        every = getattr(METHODS[method](), "every", 1)
        steps["l2"] = partial(repeated, steps["l2"], every)  # as many steps as the other
        ratio = side_by_side(steps, device, rounds).ratio(method, "l2")
        report.add(f"step_{method}_{name}", ratio.value, what + str(ratio))


def report_rate(report: Report, name: str, step, seconds: float, batch: int, device: torch.device, kind: str) -> None:
    """Adds a step's arithmetic as a percentage of the rate of a matrix product."""
    rate, peak = count_flops(step) / seconds, matrix_rate(device, kind)
    speed = f"{batch / seconds:.1f} images/s, {rate / 1e9:,.0f} GFLOP/s"
    report.add(f"step_rate_{name}", 100 * rate / peak, f"L2: {speed}, a matrix product {peak / 1e9:,.0f}")


def state_of(
    name: str, network: str, batch: int, size: int, device: torch.device, precision: str, compiled: bool = False
) -> tuple[TrainState, Regularizer, Batch]:
    """A method at the start of training, as a run sets it up, and one random batch."""
    method = METHODS[name]()
    torch.manual_seed(0)
    model = torchvision.models.get_model(network, num_classes=1000)
    source = Network(model, "fc", TAPS[network] if method.needs.taps else ()).freeze()
    source = source.to(device, memory_format=torch.channels_last)
    target = source.with_new_head(CLASSES, 0).requires_grad_(True).train(not method.needs.frozen_backbone)
    if method.needs.fitted:
        channels = {tap: model.get_submodule(tap).out_channels for tap in TAPS[network]}
        method.load_fitted({tap: torch.randn(count, device=device) for tap, count in channels.items()})
    method.setup(target)
    frozen = frozen_maps(source, method.needs.source_logits, precision) if method.needs.source else None
    schedule = ScheduleConfig(iterations=1, layer_decay=0.75 if name == "layer_decay" else 1.0)
    optimizer = make_optimizer(target, method, SGDConfig(), schedule)
    state = TrainState(target, frozen, optimizer, precision, compiled=compiled)
    return state, method, Batch(*batch_of(batch, size, device))


def step_of(name: str, *arguments, step: Step = train_step, **options) -> Callable[[], object]:
    """One training step of a method as the loop makes it, as a function without arguments.

    With every=k it makes k steps in turn, of which one has the penalty.
    """
    state, method, batch = state_of(name, *arguments, **options)
    every = getattr(method, "every", 1)
    average = EMA(EMAConfig()) if name == "ema" else Average(AverageConfig())

    def steps() -> None:
        for number in range(every):
            method.before_step(state, number, every, 0)
            step(state, method, batch)
            average.on_update(SimpleNamespace(state=state))

    return steps


def repeated(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def forward_of(name: str, batch: int, size: int, device: torch.device, precision: str):
    """A bare forward pass of the network in evaluation mode, without gradients."""
    network = torchvision.models.get_model(name, num_classes=CLASSES).eval()
    network = network.to(device, memory_format=torch.channels_last)
    images, _ = batch_of(batch, size, device)

    def forward():
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            network(images)

    return forward


def batch_of(batch: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


class PlainDelta:
    """DELTA's step as published, with formulas and order of the official code but none of its lines."""

    def __init__(self, name: str, batch: int, size: int, device: torch.device):
        torch.manual_seed(0)
        self.source = torchvision.models.get_model(name, num_classes=1000).to(device).eval()
        self.target = torchvision.models.get_model(name, num_classes=CLASSES).to(device)
        for parameter in self.source.parameters():
            parameter.requires_grad = False
        self.source_maps, self.target_maps, self.weights = [], [], []
        for tap in TAPS[name]:
            for model, maps in ((self.source, self.source_maps), (self.target, self.target_maps)):
                model.get_submodule(tap).register_forward_hook(lambda _, __, output, maps=maps: maps.append(output))
            self.weights.append(torch.rand(self.source.get_submodule(tap).out_channels, device=device))
        self.optimizer = torch.optim.SGD(self.target.parameters(), lr=0.01, momentum=0.9)
        images, self.labels = batch_of(batch, size, device)
        self.images = images.contiguous()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.source_maps.clear()
        self.target_maps.clear()
        outputs = self.target(self.images)
        loss = F.cross_entropy(outputs, self.labels)
        self.source(self.images)
        penalty = 0.0
        for target_map, source_map, weights in zip(self.target_maps, self.source_maps, self.weights, strict=True):
            b, c, h, w = target_map.shape
            distance = torch.norm(target_map - source_map.detach(), 2, (2, 3))
            penalty = penalty + 0.5 * torch.sum(c * weights / weights.sum() * distance.pow(2) / (h * w))
        head = 0.0
        for parameter_name, parameter in self.target.named_parameters():
            if parameter_name.startswith("fc."):
                head = head + 0.5 * torch.norm(parameter) ** 2
        total = loss + ALPHA * penalty + 0.01 * head
        total.backward()
        self.optimizer.step()
        self.losses = total.item(), loss.item(), (outputs.argmax(dim=1) == self.labels).sum().item()


def precision(report: Report, name: str, batch: int, size: int, rounds: int, device: torch.device) -> None:
    """The gain of bf16 over fp32 for a DELTA step."""
    key = "step_bf16"
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        report.add(key, None, "this CPU has no bf16 arithmetic")
        return
    steps = {kind: step_of("delta", name, batch, size, device, kind) for kind in ("fp32", "bf16")}
    ratio = side_by_side(steps, device, rounds).ratio("fp32", "bf16")
    report.add(key, ratio.value, f"DELTA, {name}, {size} px, batch {batch}; {ratio}")


def count_flops(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product, the best of half a second."""
    size = 8192 if device.type == "cuda" else 1536
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device)


if __name__ == "__main__":
    main()
