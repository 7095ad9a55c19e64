"""Cost of DELTA's channel attention, exact and first-order, against channel-by-channel forwards of the whole network.

    python scripts/bench_attention.py       with --device cpu | cuda, --output FILE

The plain procedure was written for this comparison. It sets the filter of a channel to 0, makes a full forward pass of
the batch (NCHW), reads the loss with `.item()`, and puts the filter back. Both procedures are timed on parts, in turn
in one process, and multiplied by the number of channels. Both also compute a small network completely, and must agree.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from scipy.stats import spearmanr
from torch import Tensor

from bench_step import CLASSES, TAPS, batch_of, count_flops
from benchmarking import Report, arguments, side_by_side
from delta_transfer.data.loader import images_at_once
from delta_transfer.methods.attention import channel_importance
from delta_transfer.methods.fast.channel_ablation import Suffix, Suffixes
from delta_transfer.models import Network


def main() -> None:
    options = arguments(__doc__.splitlines()[0], one_thread=True)
    cuda = options.device.type == "cuda"
    report = Report(options)
    # The published script evaluates batches of 32 images.
    name, size, batch, rounds = ("resnet18", 32, 4, 1) if options.quick else ("resnet101", 224, 32, 3)
    with torch.no_grad():
        parts(report, name, size, batch, images_at_once(options.device, (size, size)), rounds, options.device)
        # The first stages would take the longest and show the same.
        taps = TAPS["resnet18"][2:3] if options.quick else TAPS["resnet18"][2:]
        complete(report, options.device, taps, size=32 if options.quick else 64, rounds=1 if options.quick else 2)
    if not options.quick and not cuda:  # the ranks do not depend on the device
        taylor(report, options.device)
    report.write()


def parts(
    report: Report, name: str, size: int, batch: int, forward_images: int, rounds: int, device: torch.device
) -> None:
    """The whole attention of a large network from the cost of one chunk of channels of each tap."""
    model = torchvision.models.get_model(name, num_classes=CLASSES).to(device).eval()
    network = Network(model, "fc", TAPS[name]).freeze()
    images, labels = batch_of(batch, size, device)
    plain_images = images.contiguous()
    images = images[:forward_images]
    suffixes = Suffixes(network.copy().freeze().to(memory_format=torch.channels_last))
    _, kept = suffixes.run_intact(images)
    channels = {tap: model.get_submodule(tap).out_channels for tap in TAPS[name]}
    chunk = {tap: len(next(suffix.removals(kept, forward_images))[0]) for tap, suffix in suffixes.taps.items()}

    def chunks_of(suffix: Suffix) -> Iterator[object]:
        while True:
            yield from suffix.removals(kept, forward_images)

    works = {tap: partial(next, chunks_of(suffix)) for tap, suffix in suffixes.taps.items()}
    works["intact"] = lambda: suffixes.run_intact(images)
    works["plain"] = lambda: plain_rise(model, TAPS[name][0], 0, plain_images, labels, 0.0)

    def of_an_image(cost: dict[str, float]) -> tuple[float, float]:
        """The cost of all channels of all taps, plain and ours, from the cost of each work."""
        plain = (sum(channels.values()) + 1) * cost["plain"] / batch
        return plain, (cost["intact"] + sum(cost[tap] * channels[tap] / chunk[tap] for tap in channels)) / len(images)

    flops = {work: count_flops(function) for work, function in works.items()}
    plain, ours = of_an_image(flops)
    what = f"{name}, {size} px, {sum(channels.values()):,} channels"
    macs = f"{plain / 2e12:,.1f} against {ours / 2e12:,.2f} tera multiply-adds for an image"
    report.add("attention_multiply_adds", plain / ours, f"{what}; {macs}")

    times = side_by_side(works, device, rounds)
    ratios = [of_an_image({w: times.clock[w][i] for w in works}) for i in range(rounds)]
    ratios = sorted((plain / ours, plain, ours) for plain, ours in ratios)
    ratio, plain, ours = ratios[len(ratios) // 2]
    detail = f"{what}; {plain:,.0f} s against {ours:,.1f} s for an image, {rounds} rounds {ratios[0][0]:.2f} to"
    detail += f" {ratios[-1][0]:.2f}, from parts, {forward_images} images at once, without the probe's training"
    report.add("attention_time", ratio, detail)


def complete(report: Report, device: torch.device, taps: list[str], size: int, rounds: int) -> None:
    """Removes every channel of some taps of ResNet-18 with both procedures."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=CLASSES).to(device).eval()
    network = Network(model, "fc", taps).freeze()
    fast = network.copy().freeze().to(memory_format=torch.channels_last)
    images, labels = batch_of(8, size, device)
    results: dict[str, dict[str, Tensor]] = {}

    def plain() -> None:
        intact = F.cross_entropy(model(images.contiguous()), labels).item()
        results["plain"] = {
            tap: torch.tensor(
                [
                    plain_rise(model, tap, channel, images.contiguous(), labels, intact)
                    for channel in range(model.get_submodule(tap).out_channels)
                ]
            )
            for tap in taps
        }

    def ours() -> None:
        rises = channel_importance(fast, [(images, labels)], len(images))
        results["ours"] = {tap: rise.mean(dim=0).cpu() for tap, rise in rises.items()}

    times = side_by_side({"plain": plain, "ours": ours}, device, rounds, warm_up=0)
    agree = min(spearmanr(results["plain"][tap], results["ours"][tap]).statistic for tap in taps)
    apart = max((results["plain"][tap] - results["ours"][tap]).abs().max().item() for tap in taps)
    ratio = times.ratio("plain", "ours")
    detail = f"ResNet-18, {size} px, 8 images, {len(taps)} taps completely, {ratio.value:.1f} times as fast"
    report.add(
        "attention_agreement", agree, f"rank correlation with the plain procedure's; {detail}; apart {apart:.1e}"
    )


def plain_rise(model, tap: str, channel: int, images: Tensor, labels: Tensor, intact: float) -> float:
    """The rise of the loss without one filter."""
    weight = model.get_submodule(tap).weight
    saved = weight[channel].clone()
    weight[channel] = 0
    rise = F.cross_entropy(model(images), labels).item() - intact
    weight[channel] = saved
    return rise


def taylor(report: Report, device: torch.device) -> None:
    """First-order attention of the embedded glyphs and their source network: its ranks."""
    importances, halves = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for method in ("exact", "taylor"):
            command = [sys.executable, "-m", "delta_transfer.train", "reg=delta", f"reg.attention.method={method}"]
            command += [f"device={device.type}", "schedule.iterations=1", f"cache_dir={folder}"]
            command += [f"results_dir={folder}/{method}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (file,) = Path(folder).glob("fitted/*.safetensors")
            with safe_open(file, framework="pt") as tensors:
                importances[method] = {k: tensors.get_tensor(k) for k in tensors.keys() if "/" not in k}  # noqa: SIM118
                halves[method] = [tensors.get_tensor(k).item() for k in tensors.keys() if "/" in k]  # noqa: SIM118
            file.unlink()
    correlations = {
        tap: spearmanr(exact, importances["taylor"][tap]).statistic for tap, exact in importances["exact"].items()
    }
    each = ", ".join(f"{value:.2f}" for value in correlations.values())
    split = ", ".join(f"{value:.2f}" for value in halves["exact"])
    report.add(
        "attention_taylor",
        sum(correlations.values()) / len(correlations),
        f"glyphs, small_resnet: mean over taps ({each}); two halves of the images agree by {split}",
    )


if __name__ == "__main__":
    main()
