"""Bi-Tuning: contrast between images and between images and classes (Zhong, Wang, Kou, Long, Wang, 2020)."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import UserError
from ..engine import processes as distributed
from ..models import Network
from .base import NO_SHAPES, MapShapes, Outputs, OutputShapes, Part, Regularizer, TrainState, labels_of, not_negative
from .distances import full_precision


class BiTuning(Regularizer):
    """Loss = CE + alpha * (L_z + L_y) + beta/2 * ||head||^2, of two augmented views of each image.

    The first view goes through the target: h_q (B, d). The second goes through the key encoder: h_k. That is a copy of
    the target whose parameters follow, theta_k <- m theta_k + (1 - m) theta at the start of each step; its BatchNorm
    normalises by the batch and keeps statistics of its own. With a linear projection P, and of unit length all of

        z = P h (B, dimensions), P too has a copy that follows;  g = [h; 1] (B, d+1);  u_c = [W_c; bias_c]

    each class keeps a queue of the last Q keys z_k and g_k of its images, random ones at first. For an image of class c

        L_z = KL(e || softmax([z_q z_k, z_q queue_z(c), z_q queue_z(other classes)] / T))
        L_y = KL(e || softmax([g_q u_c, queue_g(c) u_c, queue_g(other classes) u_c] / T))

    with e = 1/(Q+1) on the first Q+1 entries and 0 elsewhere; means over the batch. CE is of the first view.

    Source: paper and Transfer-Learning-Library, with its alpha 1, Q 40, T 0.07, m 0.999, 128 dimensions and weight
    decay 5e-4; P has the backbone's learning rate. As there, u_c is constant, so that L_y trains the encoder alone,
    through g_q u_c, and the keys of the batch enter the queues after L_z and before L_y. With schedule.accumulate each
    part of a batch finds the keys of the parts before it in the queues. The second view is drawn from (seed,
    iteration), as the first one is.
    """

    views = 2

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.0,
        weight_decay: float = 5e-4,
        queue: int = 40,
        temperature: float = 0.07,
        momentum: float = 0.999,
        dimensions: int = 128,
    ):
        super().__init__(beta=beta, weight_decay=weight_decay)
        not_negative(alpha=alpha)
        self.alpha, self.queue, self.temperature = alpha, queue, temperature
        self.momentum, self.dimensions = momentum, dimensions

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        if distributed.processes() > 1:
            raise UserError("reg=bi_tuning runs in one process: the queues are not shared.")
        like = target.traced.get_submodule(target.head).weight
        classes, features = like.shape
        self.projection = nn.Linear(features, self.dimensions).to(like)
        self.key_projection = nn.Linear(features, self.dimensions).to(like).requires_grad_(False)
        self.key_projection.load_state_dict(self.projection.state_dict())
        self.key_encoder = target.copy().freeze().train()
        for name, size in (("queue_z", self.dimensions), ("queue_g", features + 1)):
            self.register_buffer(name, F.normalize(torch.randn(classes, self.queue, size), dim=2).to(like))
        self.register_buffer("position", torch.zeros(classes, dtype=torch.int64))  # of each class's next key

    def trained(self) -> list[nn.Parameter]:
        return list(self.projection.parameters())

    def trained_slowly(self) -> list[nn.Parameter]:
        return self.trained()

    def update(
        self, learner: TrainState, images: Tensor, labels: Tensor, second: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.follow(learner.target)

        def parts() -> Iterator[Part]:
            for part, part_labels, part_second in learner.split(images, labels, second):
                with torch.autocast(part.device.type, torch.bfloat16, enabled=learner.precision == "bf16"):
                    keys = self.keys(part_second)
                yield part, part_labels, keys

        return self.step_on(learner, parts())

    @torch.no_grad()
    def follow(self, target: Network) -> None:
        of_keys = [*self.key_encoder.backbone_parameters().values(), *self.key_projection.parameters()]
        followed = [*target.backbone_parameters().values(), *self.projection.parameters()]
        torch._foreach_lerp_(of_keys, followed, 1 - self.momentum)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Outputs:
        """{"embedding": h_k (B, d)} of second views."""
        return {"embedding": self.key_encoder(images)["embedding"]}

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs) -> dict[str, Tensor]:
        """`source_outputs`: what `keys` made of the second views. They enter the queues."""
        labels, h_q = labels_of(outputs), full_precision(outputs["embedding"])
        h_k = full_precision(source_outputs["embedding"])
        z_q, z_k = F.normalize(self.projection(h_q)), F.normalize(self.key_projection(h_k)).detach()
        queued_z = self.queue_z.flatten(0, 1).clone()  # the backward pass reads it when the batch has entered
        of_images = self.contrast((z_q * z_k).sum(dim=1), z_q @ queued_z.T, labels)
        self.enqueue(labels, z_k, with_one(h_k))
        u = self.classifiers(target)[labels]
        of_classes = self.contrast((with_one(h_q) * u).sum(dim=1), u @ self.queue_g.flatten(0, 1).T, labels)
        terms = {"contrast_images": self.alpha * of_images, "contrast_classes": self.alpha * of_classes}
        return terms | self.head_penalty(target)

    @staticmethod
    def classifiers(target: Network) -> Tensor:
        """u (K, d+1), constant; a head without bias has 0 there."""
        head = target.traced.get_submodule(target.head)
        bias = getattr(head, "bias", None)
        bias = head.weight.new_zeros(len(head.weight)) if bias is None else bias
        return F.normalize(torch.cat([head.weight, bias[:, None]], dim=1)).detach()

    def contrast(self, positive: Tensor, queued: Tensor, labels: Tensor) -> Tensor:
        """KL(e || softmax(logits / T)), from the similarity with the key (B,) and with all queues (B, K * Q)."""
        logarithms = (torch.cat([positive[:, None], queued], dim=1) / self.temperature).log_softmax(dim=1)
        of_class = logarithms[:, 1:].unflatten(1, (-1, self.queue)).sum(dim=2).gather(1, labels[:, None])[:, 0]
        count = self.queue + 1
        return (-(logarithms[:, 0] + of_class) / count).mean() - math.log(count)

    @torch.no_grad()
    def enqueue(self, labels: Tensor, z: Tensor, g: Tensor) -> None:
        """Each key in the place of the oldest of its class, in the order of the batch; nothing waits for the device."""
        same = labels[:, None] == labels
        rank = same.tril(-1).sum(dim=1)  # among the images of its class in this batch
        # Of more than Q images of a class the last ones stay: whoever writes to a place writes the same.
        shares = same & ((rank[:, None] - rank) % self.queue == 0)
        last = (shares * torch.arange(len(labels), device=labels.device)).argmax(dim=1)
        places = labels * self.queue + (self.position[labels] + rank) % self.queue
        self.queue_z.flatten(0, 1)[places] = z[last].to(self.queue_z)
        self.queue_g.flatten(0, 1)[places] = g[last].to(self.queue_g)
        self.position.index_add_(0, labels, torch.ones_like(labels)).remainder_(self.queue)


def with_one(features: Tensor) -> Tensor:
    """g = [h; 1] of unit length, (B, d) -> (B, d+1)."""
    return F.normalize(F.pad(features, (0, 1), value=1.0))
