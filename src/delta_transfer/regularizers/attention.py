"""DELTA's supervised channel attention: how much the loss rises when a channel is removed.

1. `train_probe`: a new head on the frozen source network (L2-FE), BatchNorm in evaluation mode.
2. `channel_importance`: for every tapped channel, cross-entropy without it minus cross-entropy with it. Only what lies
   behind the tap is computed again, for many removed channels in one batch.
3. `attention_weights`: standardised per layer, softmax with a temperature.

Source: official DELTA code. It removes a channel by setting its filter to 0; at a tap that is a convolution without
bias this is the same as setting the channel of the tapped map to 0, which is what is done here, so that taps which are
not convolutions (Inception's blocks) have a meaning too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AttentionConfig
from ..environment import images_at_once, seconds_of
from ..models import Network, frozen_backbone, in_parts
from .base import Batches
from .suffixes import Suffixes


def train_probe(source: Network, batches: Batches, num_classes: int, options: AttentionConfig) -> Network:
    """`source` with a new head for `num_classes`, trained on `batches`; everything else stays as it is.

    SGD, momentum 0.9; the learning rate falls exponentially, to a tenth after 6 epochs (official code).
    """
    probe = source.with_new_head(num_classes, options.seed).freeze()
    frozen = frozen_backbone(probe)
    parameters = list(probe.head_parameters().values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, lr=options.head_lr, momentum=0.9, weight_decay=options.head_weight_decay)
    for epoch in range(options.head_epochs):
        optimizer.param_groups[0]["lr"] = options.head_lr * 0.1 ** (epoch / 6)
        for images, labels in batches:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(in_parts(frozen, images)["logits"], labels).backward()
            optimizer.step()
    return probe.freeze()


@torch.no_grad()
def channel_importance(
    probe: Network, batches: Batches, images: int, forward_images: int | None = None
) -> dict[str, Tensor]:
    """Rise of each image's cross-entropy when one channel of a tapped map is set to 0, {tap: (images, C_l) fp64}.

    The mean over images is the channel's importance. It takes the first `images` images of `batches` (further passes if
    one is too short). `forward_images` bounds how many images go through the network at once, counting each removed
    channel's copy; it changes no result. None: as many as suit the device.
    """
    suffixes = Suffixes(probe)
    forward_images = forward_images or images_at_once(next(probe.parameters()).device)
    rises: dict[str, list[Tensor]] = {tap: [] for tap in probe.taps}
    remaining = images
    for inputs, labels in endlessly(batches):
        inputs, labels = inputs[:remaining], labels[:remaining]
        # In parts, so that the intact pass too stays within `forward_images`.
        for part, part_labels in zip(inputs.split(forward_images), labels.split(forward_images), strict=True):
            for tap, rise in _rises_on(suffixes, part, part_labels, forward_images).items():
                rises[tap].append(rise)
        remaining -= len(inputs)
        if remaining == 0:
            break
    return {tap: torch.cat(parts) for tap, parts in rises.items()}


def taylor_importance(
    probe: Network, batches: Batches, images: int, forward_images: int | None = None
) -> dict[str, Tensor]:
    """First-order estimate of the same, -sum_{h,w} a * dCE/da of each channel, {tap: (images, C_l)}; one backward pass.

    a is the tapped map; removing a channel changes it by -a (Molchanov et al., ICLR 2017).
    """
    estimates: dict[str, list[Tensor]] = {tap: [] for tap in probe.taps}
    forward_images = forward_images or images_at_once(next(probe.parameters()).device)
    remaining = images
    for inputs, labels in endlessly(batches):
        inputs, labels = inputs[:remaining], labels[:remaining]
        for part, part_labels in zip(inputs.split(forward_images), labels.split(forward_images), strict=True):
            outputs = probe(part.detach().requires_grad_(True))
            maps = [outputs[tap] for tap in probe.taps]
            gradients = torch.autograd.grad(F.cross_entropy(outputs["logits"], part_labels, reduction="sum"), maps)
            for tap, feature_map, gradient in zip(probe.taps, maps, gradients, strict=True):
                estimates[tap].append(-(feature_map.detach() * gradient).sum(dim=(2, 3)))
        remaining -= len(inputs)
        if remaining == 0:
            break
    return {tap: torch.cat(parts) for tap, parts in estimates.items()}


def split_half_correlation(rises: Tensor) -> float | None:
    """Spearman's rank correlation between a layer's importances on the even and on the odd images; rises (images, C).

    Near 1: the images were enough to rank the channels. Near 0: another draw of images would give another ranking.
    None where it has no meaning: one image, one channel, or no channel that matters more than another.
    """
    from scipy.stats import spearmanr  # slow to import

    if min(rises.shape) < 2:
        return None
    even, odd = (half.double().mean(dim=0).cpu().numpy() for half in (rises[::2], rises[1::2]))
    if even.min() == even.max() or odd.min() == odd.max():
        return None
    return float(spearmanr(even, odd).statistic)


@torch.no_grad()
def removal_cost(
    source: Network, images: Tensor, forward_images: int | None = None
) -> tuple[dict[str, int], float, float]:
    """Channels of each tap, and the measured seconds, per image, of a forward pass and of removing every channel."""
    suffixes = Suffixes(source)
    forward_images = forward_images or images_at_once(images.device)
    forward = seconds_of(lambda: suffixes.run_intact(images), images.device)
    _, kept = suffixes.run_intact(images)
    removal, channels = 0.0, {}
    for tap, suffix in suffixes.taps.items():
        channels[tap] = kept[suffix.tap].shape[1]
        removed, _ = next(suffix.removals(kept, forward_images))
        first = seconds_of(lambda suffix=suffix: next(suffix.removals(kept, forward_images)), images.device)
        removal += first / len(removed) * channels[tap]
    return channels, forward / len(images), removal / len(images)


def attention_weights(importance: Tensor, temperature: float) -> Tensor:
    """w = softmax((v - mean v) / (T * std v)) of one layer, (C,) -> (C,), with the population standard deviation.

    Uniform where all channels matter the same.
    """
    spread = importance.std(correction=0)
    if spread == 0:
        return torch.full_like(importance, 1 / len(importance))
    return torch.softmax((importance - importance.mean()) / spread / temperature, dim=0)


def endlessly(batches: Batches) -> Batches:
    """One pass after the other. Raises ValueError if a pass is empty, as a generator's second one is."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("A pass over the batches was empty: give a DataLoader or a list, not a generator.")


def _rises_on(suffixes: "Suffixes", images: Tensor, labels: Tensor, forward_images: int) -> dict[str, Tensor]:
    """Rises on one batch, {tap: (B, C_l) fp64}."""
    logits, kept = suffixes.run_intact(images)
    intact = F.cross_entropy(logits.double(), labels, reduction="none")
    rises = {}
    for tap, suffix in suffixes.taps.items():
        losses = [
            F.cross_entropy(logits.double().flatten(0, 1), labels.repeat(len(removed)), reduction="none")
            for removed, logits in suffix.removals(kept, forward_images)
        ]
        rises[tap] = torch.cat(losses).view(-1, len(labels)).T - intact[:, None]
    return rises
