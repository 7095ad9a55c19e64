"""DELTA's supervised channel attention: how much the loss rises when a channel is removed.

`channel_attention` does all of it, for any loop:

1. `train_probe`: a new head on the frozen source network (L2-FE), BatchNorm in evaluation mode by default.
2. `channel_importance`: for every tapped channel, cross-entropy without it minus cross-entropy with it. Only the part
   of the network behind the tap is computed again, for many removed channels in one batch.
3. `attention_weights`: the importances, standardised per layer, through a softmax with a temperature.

Source: official DELTA code (lixingjian/DELTA at 45054d4, channel_eval.py). It trains the head with BatchNorm in
training mode, by accident: batch statistics normalise, and running statistics move to the new data. Importance is then
measured with these. Here BatchNorm keeps the source's statistics by default, since the source's channels are weighed;
probe_batchnorm=train does what the code does. Its run.sh takes batches of 32 and 128 images (4 batches):
batch_size=32, images=128. The code removes a channel by setting its filter to 0. Here the channel of the tapped map is
set to 0. Both are equal at a convolution without bias; only the second is defined at other taps (Inception's blocks).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import UserError
from ..common.options import LARGEST_BATCH, LONGEST, Options, option
from ..common.timing import seconds_of
from ..data.loader import images_at_once
from ..models import Network, call, forward_in_chunks, frozen_backbone
from .base import UNLABELLED, Batches, SampleLoss, options_in
from .fast.channel_ablation import Suffix, Suffixes, WholePass, WholePasses, suffixes_of
from .unfinished import NOTHING_KEPT, Unfinished


@dataclass
class AttentionConfig(Options):
    """How the importance of a network's channels is measured, and how it becomes their weights."""

    key: ClassVar[str] = "reg.attention"

    method: str = option(
        "exact",
        "exact: every channel is removed once; taylor: first-order estimate from one backward pass, much cheaper",
        choices=("exact", "taylor"),
    )
    images: int = option(256, "training images on which removing a channel is tried", above=0, at_most=LONGEST)
    head_epochs: int = option(
        10, "epochs, over the training images, in which the probe's head is trained", above=0, at_most=LONGEST
    )
    head_images: int | None = option(
        None,
        "training images, counted in each epoch, on which the probe's head is trained in all: epochs become as short "
        "as that takes; null: whole epochs",
        above=0,
        at_most=LONGEST,
    )
    head_lr: float = option(0.01, "learning rate of the probe's head in its first epoch", above=0)
    head_weight_decay: float = option(1e-4, "weight decay of the probe's head", at_least=0)
    temperature: float = option(5.0, "temperature of the softmax over a layer's standardised importances", above=0)
    probe_batchnorm: str = option(
        "eval",
        "BatchNorm while the head is trained: eval, the source's statistics; train, those of batches, and they move on",
        choices=("eval", "train"),
    )
    batch_size: int | None = option(
        None, "images per batch of the probe; null: schedule.batch_size", above=0, at_most=LARGEST_BATCH
    )
    forward_images: int | None = option(
        None,
        "images per forward pass while probing, which bounds the memory; null: as many as suit the device",
        above=0,
        identity=False,
    )
    seed: int = option(0, "seed of the probe's head, and of its images' order and crops; not the run's", at_least=0)
    shuffle: int | None = option(
        None,
        "a control: seed of a random order in which a layer's weights are given to its channels; null: each to its own",
        at_least=0,
    )


@dataclass(frozen=True)
class ChannelImportance:
    """How much each channel of each tapped map matters to the cross-entropy of a network."""

    rises: dict[str, Tensor]  # {tap: (samples, C_l) fp64}, nats: cross-entropy without the channel minus with it
    temperature: float = 5.0

    @property
    def importance(self) -> dict[str, Tensor]:
        """v_l, {tap: (C_l,) fp32}: the mean rise over the samples, in nats. DELTA.load_fitted takes it.

        It is negative where the network is better off without the channel.
        """
        return {tap: rises.mean(dim=0).float() for tap, rises in self.rises.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """w_l = softmax((v_l - mean v_l) / (T * std v_l)), {tap: (C_l,) fp32}, sum 1; DELTA multiplies by C_l."""
        return {tap: attention_weights(v, self.temperature) for tap, v in self.importance.items()}

    @property
    def agreement(self) -> dict[str, float | None]:
        """By tap, how well two halves of the samples agree on the channels' ranking (`split_half_correlation`)."""
        return {tap: split_half_correlation(rises) for tap, rises in self.rises.items()}


def channel_attention(
    network: Network,
    batches: Batches,
    num_classes: int | None = None,
    options: AttentionConfig | Mapping[str, Any] | None = None,
    loss: SampleLoss = F.cross_entropy,
    unfinished: Unfinished = NOTHING_KEPT,
) -> ChannelImportance:
    """How much the cross-entropy of `network` rises when one channel of one of its tapped maps is set to 0.

    Returns the rises of all samples, (samples, C_l) by tap, in nats.

    Args:
        network: a result of `models.tapped`. It stays as it is: a copy in evaluation mode is probed.
        batches: pairs of inputs and labels (B,) on the network's device; any iterable that can be iterated over again,
            such as a DataLoader. Inputs are a tensor, or a tuple or dict of the model's arguments. Labels of -100 are
            left out.
        num_classes: number of classes of the labels, if the network's head belongs to another task. A new head is then
            trained on `batches` first, with all else frozen. None: the head belongs to the labels.
        options: an AttentionConfig, or a dict of some of its options. `images` (256 by default) is the number of
            samples. Tensors are cut to exactly that many; other inputs are taken in whole batches until it is reached.
        loss: replaces the cross-entropy where labels are not classes.
        unfinished: keeps what is done, for another call with the same arguments, whose `batches` have `go_to`.

    In a traced network only the part behind a tap is computed again; a HookedNetwork takes a whole pass for every
    channel and batch. On a GPU convolutions use TF32, unless `torch.backends.cudnn.allow_tf32` forbids it. This is 2.4
    times as fast, and the ranks correlate with those in double precision by 0.9998 (ResNet-18, 64 photographs).

    Source of the formula: official DELTA code (Li et al., ICLR 2019). The standardised softmax of `weights` is in that
    code, but not in the paper. Raises UserError where method="taylor" is not defined, and ValueError if a pass over
    `batches` has no labelled sample, such as the second pass over a generator.
    """
    options = options_in(AttentionConfig, options)
    if num_classes is None:
        probe = network.copy().freeze()
    else:
        probe = train_probe(network, batches, num_classes, options, loss, unfinished)
    if options.method == "taylor":
        rises = taylor_importance(probe, batches, options.images, options.forward_images, loss)
    else:
        rises = channel_importance(probe, batches, options.images, options.forward_images, loss, unfinished)
    return ChannelImportance(rises, options.temperature)


def train_probe(
    source: Network,
    batches: Batches,
    num_classes: int,
    options: AttentionConfig,
    loss: SampleLoss = F.cross_entropy,
    unfinished: Unfinished = NOTHING_KEPT,
) -> Network:
    """`source` with a new head for `num_classes`, trained on `batches`; everything else stays as it is.

    It is trained by SGD with momentum 0.9. The learning rate falls exponentially, to a tenth after 6 epochs (official
    code). With head_images each epoch ends early, after equally many batches and at least one, so that `batches` should
    be shuffled; the learning rate falls as in whole epochs. With probe_batchnorm=train whole batches go through the
    network in training mode: BatchNorm normalises by them, its statistics move, and dropout draws.
    """
    probe = source.with_new_head(num_classes, options.seed).freeze()
    adapts = options.probe_batchnorm == "train"
    frozen = probe.train() if adapts else frozen_backbone(probe)
    parameters = list(probe.head_parameters().values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, lr=options.head_lr, momentum=0.9, weight_decay=options.head_weight_decay)
    changing = {name: p.detach() for name, p in probe.head_parameters().items()} | dict(probe.named_buffers())
    length = len(batches) if isinstance(batches, Sized) else 0
    most, begin = 0, (0, 0)  # batches of an epoch; 0: not known yet
    if begun := unfinished.load():
        most = begun.get("most", length)
        begin = divmod(begun["done"], most)
        batches.go_to(begun["done"], begin[1])  # type: ignore[attr-defined]
        for name, value in begun["values"].items():
            changing[name].copy_(value)
        optimizer.load_state_dict(begun["optimizer"])
    for epoch in range(begin[0], options.head_epochs):
        optimizer.param_groups[0]["lr"] = options.head_lr * 0.1 ** (epoch / 6)
        for number, (inputs, labels) in enumerate(batches, begin[1] if epoch == begin[0] else 0):
            optimizer.zero_grad(set_to_none=True)
            if loss is F.cross_entropy:
                check_labels(labels, num_classes)
            outputs = call(frozen, inputs) if adapts else forward_in_chunks(frozen, inputs)
            loss(outputs["logits"], labels).backward()
            optimizer.step()
            most = most or batches_of_epoch(options, len(labels), length)
            done = epoch * most + number + 1
            kept = {"done": done, "most": most, "values": changing, "optimizer": optimizer.state_dict()}
            unfinished.note("training its probe, batch", done, options.head_epochs * most, kept)
            if options.head_images and number + 1 == most:
                break
    return probe.freeze()


def batches_of_epoch(options: AttentionConfig, batch: int, whole: int) -> int:
    """Batches of `batch` images in an epoch of the probe. whole: those of a pass; 0: unknown, as is then the result."""
    if options.head_images is None:
        return whole
    most = max(1, options.head_images // (options.head_epochs * batch))
    return min(most, whole) if whole else most


@torch.no_grad()
def channel_importance(
    probe: Network,
    batches: Batches,
    images: int,
    forward_images: int | None = None,
    loss: SampleLoss = F.cross_entropy,
    unfinished: Unfinished = NOTHING_KEPT,
) -> dict[str, Tensor]:
    """Rise of each image's cross-entropy when one channel of a tapped map is set to 0, {tap: (images, C_l) fp64}.

    The mean over images is the channel's importance. It takes the first `images` images of `batches`, in further passes
    if one is too short. `forward_images` bounds how many images go through the network at once, counting each removed
    channel's copy; it changes no result. None: as many as suit the device.
    """
    suffixes, what = suffixes_of(probe), "removing channels, image"
    begun = (unfinished.load() or {}).get("rises")  # {tap: a list of chunks}
    rises: dict[str, list[Tensor]] = begun or {tap: [] for tap in probe.taps}
    done = skip = sum(len(rise) for rise in next(iter(rises.values()), []))
    for inputs, labels in samples(batches, images, forward_images):
        seen = _labelled(labels).cumsum(0)
        if seen[-1] <= skip:
            skip -= int(seen[-1])
            continue
        if skip:  # the chunks of before were of another size
            first = int((seen <= skip).sum())
            inputs, labels, skip = inputs[first:], labels[first:], 0
        show = partial(unfinished.show, what, done, images)
        for tap, rise in _rises_on(suffixes, inputs, labels, forward_images, loss, show).items():
            rises[tap].append(rise)
        done += len(rise)
        unfinished.note(what, done, images, {"rises": rises})
    return {tap: torch.cat([part.to(labels.device) for part in parts]) for tap, parts in rises.items()}


def taylor_importance(
    probe: Network,
    batches: Batches,
    images: int,
    forward_images: int | None = None,
    loss: SampleLoss = F.cross_entropy,
) -> dict[str, Tensor]:
    """First-order estimate of the same, -sum_{h,w} a * dCE/da of each channel, {tap: (images, C_l)}; one backward pass.

    a is the tapped map; removing a channel changes it by -a (Molchanov et al., ICLR 2017).
    """
    estimates: dict[str, list[Tensor]] = {tap: [] for tap in probe.taps}
    for inputs, labels in samples(batches, images, forward_images):
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise UserError("method=taylor needs a tensor of numbers as the network's input: choose method=exact.")
        outputs = probe(inputs.detach().requires_grad_(True))
        maps = [outputs[tap] for tap in probe.taps]
        if any(len(feature_map) != len(labels) for feature_map in maps):
            raise UserError("method=taylor needs maps with as many rows as labels: choose method=exact.")
        gradients = torch.autograd.grad(loss(outputs["logits"], labels, reduction="sum"), maps)
        for tap, feature_map, gradient in zip(probe.taps, maps, gradients, strict=True):
            estimates[tap].append(-(feature_map.detach() * gradient).sum(dim=(2, 3)))
    return {tap: torch.cat(parts) for tap, parts in estimates.items()}


def split_half_correlation(rises: Tensor) -> float | None:
    """Spearman's rank correlation between a layer's importances on the even and on the odd images; rises (images, C).

    Near 1, the images were enough to rank the channels. Near 0, another draw of images would give another ranking.
    None where it has no meaning: for one image, for one channel, or if no channel matters more than another.
    """
    if min(rises.shape) < 2:
        return None
    even, odd = (half.double().mean(dim=0).cpu().numpy() for half in (rises[::2], rises[1::2]))
    if even.min() == even.max() or odd.min() == odd.max():
        return None
    return float(np.corrcoef(_ranks(even), _ranks(odd))[1, 0])


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values share the mean of their ranks. scipy.stats has it too, but takes a second to import."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


@torch.no_grad()
def removal_cost(
    source: Network, images: Any, forward_images: int | None = None
) -> tuple[dict[str, int], float, float]:
    """The channels of each tap, and the measured seconds per image of a forward pass and of removing all channels."""
    suffixes = suffixes_of(source)
    forward_images = forward_images or images_at_once(images.device)
    forward = seconds_of(lambda: suffixes.run_intact(images), images.device)
    _, kept = suffixes.run_intact(images)
    removal, channels = 0.0, {}
    for tap, suffix in suffixes.taps.items():
        channels[tap] = source.map_shapes_on(images)[tap][0]
        removed, _ = _first_removal(suffix, kept, forward_images)
        first = seconds_of(partial(_first_removal, suffix, kept, forward_images), images.device)
        removal += first / len(removed) * channels[tap]
    return channels, forward / len(images), removal / len(images)


def _first_removal(suffix: Suffix | WholePass, kept: Any, forward_images: int) -> tuple[Tensor, Tensor]:
    return next(suffix.removals(kept, forward_images))


def attention_weights(importance: Tensor, temperature: float) -> Tensor:
    """w = softmax((v - mean v) / (T * std v)) of one layer, (C,) -> (C,), with the population standard deviation.

    It is uniform where all channels matter the same.
    """
    spread = importance.std(correction=0)
    if spread == 0:
        return torch.full_like(importance, 1 / len(importance))
    return torch.softmax((importance - importance.mean()) / spread / temperature, dim=0)


def samples(batches: Batches, count: int, at_once: int | None) -> Iterator[tuple[Any, Tensor]]:
    """Inputs and labels of the first `count` labelled samples, in further passes if one is too short.

    Tensors are cut to that number and yielded in chunks of `at_once`, which bounds the intact pass, too; None: as many
    as suit the device. Other inputs are yielded in whole batches, since nothing says where a sample ends. Raises
    ValueError if a pass has no labelled sample, such as the second pass over a generator.
    """
    while count > 0:
        before = count
        for inputs, labels in batches:
            if isinstance(inputs, Tensor):
                inputs, labels = inputs[:count], labels[:count]
                chunk = at_once or images_at_once(inputs.device)
                yield from zip(inputs.split(chunk), labels.split(chunk), strict=True)
            else:
                yield inputs, labels
            count -= int(_labelled(labels).sum())
            if count <= 0:
                return
        if count == before:
            raise ValueError("A pass over the batches was empty: give a DataLoader or a list, not a generator.")


def _labelled(labels: Tensor) -> Tensor:
    """Which samples (B,) have a label."""
    return (labels != UNLABELLED).view(len(labels), -1).any(dim=1)


def _rises_on(
    suffixes: Suffixes | WholePasses,
    inputs: Any,
    labels: Tensor,
    forward_images: int | None,
    loss: SampleLoss,
    show: Callable[[str], None],
) -> dict[str, Tensor]:
    """The rises on one batch, {tap: (B, C_l) fp64}, without samples that have no label. It shows how far it is."""
    forward_images = forward_images or images_at_once(labels.device)
    logits, kept = suffixes.run_intact(inputs)
    intact = loss(logits.double(), labels, reduction="none")
    rises = {}
    for tap, suffix in suffixes.taps.items():
        losses: list[Tensor] = []
        for removed, logits in suffix.removals(kept, forward_images):
            losses.append(loss(logits.double().flatten(0, 1), torch.cat([labels] * len(removed)), reduction="none"))
            show(f"channel {sum(map(len, losses)) // len(labels)} of {tap}")
        rises[tap] = (torch.cat(losses).view(-1, len(labels)).T - intact[:, None])[_labelled(labels)]
    return rises


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises UserError unless labels (B,) are whole numbers below `num_classes`, or UNLABELLED.

    It waits for the device, which a training step must not.
    """
    if labels.dim() != 1 or labels.is_floating_point():
        raise UserError(
            f"Labels are whole numbers, one for each image, (B,); these have the shape {tuple(labels.shape)} and are "
            f"{labels.dtype}."
        )
    wrong = labels[(labels != UNLABELLED) & ((labels < 0) | (labels >= num_classes))]
    if len(wrong):
        raise UserError(
            f"The label {int(wrong[0])} is none of the classes 0 to {num_classes - 1}: num_classes={num_classes} is "
            "too small, or labels do not begin at 0."
        )


def relative_entropy(weights: Tensor) -> Tensor:
    """Mean entropy of weights (B, K) that sum to 1 over K, as a fraction of log K: 1 if all K are alike."""
    if weights.shape[1] == 1:
        return weights.new_ones(())
    entropy: Tensor = torch.special.entr(weights).sum(dim=1).mean() / math.log(weights.shape[1])
    return entropy
