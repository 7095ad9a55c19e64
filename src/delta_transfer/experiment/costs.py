"""Time and memory of a method on a network, from a few measured steps on random images with random weights.

On a CPU fewer images go into a step than in a run (time is proportional to them there), and GPU memory is estimated
from what a step keeps for its backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..common.console import log
from ..common.hardware import images_at_once, reset_peak_memory, seconds_of
from ..config import BackboneConfig, RunConfig
from ..engine.loop import TrainState, autocast, make_optimizer
from ..methods import Regularizer
from ..models import Network, frozen_maps
from ..models.zoo import build_source
from .sources import Loaded, frozen, shapes_of, sources_of

FEW = 4  # images of a step in which something is only counted


@dataclass(frozen=True)
class Cost:
    step_seconds: float  # of a training step
    view_seconds: float  # of one test crop
    fit_seconds: tuple[float, float]  # of what is computed before training: per training image, and beside that
    memory_bytes: int  # GPU memory of a step
    weights_bytes: int  # of the model.safetensors that a run leaves


# Of reg.
NO_COST = ("alpha", "beta", "weight_decay", "channel_alpha", "channel_lr_factor", "aligned_to", "temperature")
NO_COST += ("p", "eps", "form", "at", "bound", "momentum")


def decides_cost(config: RunConfig) -> tuple[str, ...]:
    """Of a step: the networks, the method but not its strength, the batch."""
    backbone = {key: value for key, value in vars(config.backbone).items() if key != "weights"}
    batch = config.schedule.batch_size, config.schedule.accumulate
    networks = repr(backbone), repr(config.source)
    return repr(_without_strength(config.reg)), *networks, repr(batch), config.precision, config.device


def _without_strength(reg) -> dict[str, object]:
    options = {key: value for key, value in vars(reg).items() if key not in NO_COST}
    if "terms" in options:  # of a sum
        options["terms"] = {name: _without_strength(term) for name, term in options["terms"].items()}
    return options


def measure(config: RunConfig, method: Regularizer, num_classes: int, device: torch.device) -> Cost:
    """Times a few steps on random images with random weights, which cost the same as any others.

    They are of the method's first stage; a step of the others costs about the same.
    """
    stages = method.stages()
    regularizer = stages[0].regularizer
    log.info(f"measuring {config.backbone.name}, {config.reg.name} ...")
    parts = config.schedule.accumulate
    backbone, batch = replace(config.backbone, weights="none"), config.schedule.batch_size // parts  # at a time
    source = build_source(backbone, 0, tapped=regularizer.needs_taps)
    source = source.to(device, memory_format=torch.channels_last).freeze()
    target = source.with_new_head(num_classes, 0).requires_grad_(True).train(not regularizer.freezes_backbone)
    previous = target.copy() if len(stages) > 1 else None  # what a stage left is kept through the next

    def random_images(count: int) -> Tensor:
        images = torch.rand(count, 3, backbone.image_size, backbone.image_size, device=device)
        return images.contiguous(memory_format=torch.channels_last)

    fit_seconds = (0.0, 0.0)
    for fitting in regularizer.to_fit():
        fitted, per_image, beside = fitting.rehearse(source, random_images(FEW), num_classes)
        fitting.load_fitted(fitted)
        fit_seconds = fit_seconds[0] + per_image, fit_seconds[1] + beside
    reset_peak_memory(device)
    shapes = source.map_shapes(batch, backbone.image_size, training=not regularizer.freezes_backbone)
    others = random_sources(config, regularizer.needs_taps)
    with_logits = regularizer.needs_source_logits
    if others:
        source_shapes = shapes_of(others, batch, backbone.image_size, with_logits)
    else:
        source_shapes = {**shapes, "logits": (source.classes,)} if with_logits else None
    regularizer.start(target, shapes, source_shapes)
    regularizer.to(device)
    optimizer = make_optimizer(target, regularizer, config.schedule)
    maps = None
    if regularizer.needs_source and others:
        maps = frozen(others, backbone, with_logits, config.precision).to(device, memory_format=torch.channels_last)
    elif regularizer.needs_source:
        maps = frozen_maps(source, with_logits, config.precision)
    learner = TrainState(target, maps, optimizer, config.precision, backbone.aux_weight)

    def step(count: int) -> Callable[[], object]:
        images, *views = (random_images(count) for _ in range(regularizer.views))
        labels = torch.zeros(count, dtype=torch.int64, device=device)
        return lambda: regularizer.update(learner, images, labels, *views)

    kept = {}
    for count in (FEW // 2, FEW):  # also warms up
        saved = _Saved()
        with saved:
            step(count)()
        kept[count] = saved.bytes
    count, few_seconds = batch, 0.0
    if device.type != "cuda":  # as many images as take about a second
        few_seconds = seconds_of(step(FEW), device, at_least=0.1)
        count = min(batch, max(FEW, round(FEW / few_seconds)))
    step_seconds = few_seconds if count == FEW else seconds_of(step(count), device)
    step_seconds *= parts * batch / count
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        per_image = (kept[FEW] - kept[FEW // 2]) / (FEW - FEW // 2)
        gradient_and_momentum = 2 * sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
        networks = [network for network in (source, previous, target, maps, regularizer) if network is not None]
        networks = sum(v.nbytes for network in networks for v in (*network.parameters(), *network.buffers()))
        memory = kept[FEW] + per_image * (batch - FEW) + networks + gradient_and_momentum
    target.eval()
    images = random_images(images_at_once(device))
    with torch.inference_mode(), autocast(device, config.precision):
        view_seconds = seconds_of(lambda: target(images), device) / len(images)
    weights_bytes = sum(v.nbytes for v in target.weights().values())
    return Cost(step_seconds, view_seconds, fit_seconds, int(memory), weights_bytes)


def random_sources(config: RunConfig, tapped: bool) -> list[Loaded]:
    """The networks of `config.source`, with random weights: none has to be here."""

    def loaded(name: str, backbone: BackboneConfig) -> Loaded:
        network: Network = build_source(replace(backbone, weights="none"), 0, tapped=tapped).freeze()
        return Loaded(name, backbone, network, fingerprint="")

    return [loaded(source.name, source.backbone) for source in sources_of(config.source)]


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for the backward pass, parameters left out."""

    def __init__(self):
        self.bytes, self.seen = 0, set()
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor
