"""Bi-Tuning: contrast between images, and between images and classes (Zhong, Wang, Kou, Long, Wang, 2020)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.options import LARGEST_BATCH, option
from ..models import Network
from .base import (
    DECAY,
    METHODS,
    NO_SHAPES,
    MapShapes,
    Needs,
    Outputs,
    Penalty,
    SourceShapes,
    TrainState,
    full_precision,
    labels_of,
)


@METHODS.register("bi_tuning", "Bi-Tuning")
class BiTuning(Penalty):
    """Loss = CE + alpha * (L_z + L_y) + beta/2 * ||head||^2, from two augmented views of each image.

    The first view goes through the target and gives the embedding h_q (B, d). The second view goes through the key
    encoder and gives h_k. The key encoder is a copy of the target whose parameters follow the target's,
    theta_k <- m theta_k + (1 - m) theta, at the start of each step. Its BatchNorm normalises by the batch and keeps
    statistics of its own. P is a linear projection, and its copy follows it in the same way. The vectors

        z = P h (B, dimensions);  g = [h; 1] (B, d+1);  u_c = [W_c; bias_c]

    are scaled to unit length. Each class keeps a queue of the last Q keys z_k and g_k of its images. The queues begin
    with random keys. For an image of class c

        L_z = KL(e || softmax([z_q z_k, z_q queue_z(c), z_q queue_z(other classes)] / T))
        L_y = KL(e || softmax([g_q u_c, queue_g(c) u_c, queue_g(other classes) u_c] / T))

    with e = 1/(Q+1) on the first Q+1 entries and 0 elsewhere. Both are means over the batch. CE is that of the first
    view.

    Source: the paper and Transfer-Learning-Library (thuml/Transfer-Learning-Library at 9fcd99c,
    tllib/regularization/bi_tuning.py), with its alpha 1, Q 40, T 0.07, m 0.999, 128 dimensions and weight decay 5e-4. P
    has the backbone's learning rate. As in the library, u_c is constant, so that L_y trains the encoder alone, through
    g_q u_c, and the keys of the batch enter the queues after L_z and before L_y. Deviation: the library's head begins
    with N(0, 0.01) and biases of 0, which head_std=0.01 does; here it begins as in every method, so that all methods of
    one seed have the same first head. With schedule.accumulate, each micro-batch finds the keys of the micro-batches
    before it in the queues. The second view is drawn from (seed, iteration), as the first one is.

    `penalty` takes the second views as outputs["view_2"], (B, 3, H, W), and raises UserError without them. In a loop
    of your own call `follow(target)` before each step.
    """

    alpha: float = option(1.0, "strength of both contrasts", at_least=0)
    weight_decay: float = option(5e-4, DECAY, at_least=0)
    queue: int = option(40, "past keys that each class keeps", above=0, at_most=LARGEST_BATCH)
    temperature: float = option(0.07, "temperature of the softmax over similarities", above=0)
    momentum: float = option(0.999, "share of the key encoder's weights that a step keeps", at_least=0, below=1)
    dimensions: int = option(128, "dimensions of the projected embeddings", above=0, at_most=LARGEST_BATCH)
    head_std: float | None = option(
        None, "the head begins with weights of this standard deviation and biases of 0; null: PyTorch's", at_least=0
    )

    needs = Needs(views=2, images=True, one_label=True)

    def requires(self, model: nn.Module, optimizer: str, processes: int) -> None:
        if processes > 1:
            raise UserError("reg=bi_tuning runs in one process: processes do not share the queues.")

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        like = target.head_parameters()[f"{target.head}.weight"]
        classes, features = like.shape
        self.projection = nn.Linear(features, self.dimensions).to(like)
        self.key_projection = nn.Linear(features, self.dimensions).to(like).requires_grad_(False)
        self.key_projection.load_state_dict(self.projection.state_dict())
        if self.head_std is not None:
            for name, parameter in target.head_parameters().items():
                nn.init.normal_(parameter, std=self.head_std if name.endswith("weight") else 0.0)
        self.key_encoder = target.copy().freeze().train()
        self.queue_z, self.queue_g = (
            nn.Buffer(F.normalize(torch.randn(classes, self.queue, size), dim=2).to(like))
            for size in (self.dimensions, features + 1)  # of z and g
        )
        self.position = nn.Buffer(torch.zeros(classes, dtype=torch.int64))  # where the next key of each class goes

    def trained(self) -> list[nn.Parameter]:
        return list(self.projection.parameters())

    def trained_slowly(self) -> list[nn.Parameter]:
        return self.trained()

    def before_step(self, state: TrainState, step: int, steps: int, seed: int) -> None:
        self.follow(state.target)

    @torch.no_grad()
    def follow(self, target: Network) -> None:
        """Moves the key encoder and its projection towards the target, by the share 1 - m."""
        of_keys: list[Tensor] = [*self.key_encoder.backbone_parameters().values(), *self.key_projection.parameters()]
        followed: list[Tensor] = [*target.backbone_parameters().values(), *self.projection.parameters()]
        torch._foreach_lerp_(of_keys, followed, 1 - self.momentum)

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        """The keys of the second views enter the queues here."""
        labels, h_q = labels_of(outputs), full_precision(outputs["embedding"])
        h_k = self.keys(outputs)
        z_q, z_k = F.normalize(self.projection(h_q)), F.normalize(self.key_projection(h_k)).detach()
        queued_z = self.queue_z.flatten(0, 1).clone()  # the backward pass reads it when the batch has entered
        of_images = self.contrast((z_q * z_k).sum(dim=1), z_q @ queued_z.T, labels)
        self.enqueue(labels, z_k, with_one(h_k))
        u = self.classifiers(target)[labels]
        of_classes = self.contrast((with_one(h_q) * u).sum(dim=1), u @ self.queue_g.flatten(0, 1).T, labels)
        terms = {"contrast_images": self.alpha * of_images, "contrast_classes": self.alpha * of_classes}
        return terms | self.head_penalty(target)

    @torch.no_grad()
    def keys(self, outputs: Outputs) -> Tensor:
        """h_k (B, d) of the second views, from a pass in the precision in which the target made its outputs."""
        if "view_2" not in outputs:
            raise UserError('Bi-Tuning needs a second view of each image: set outputs["view_2"] = second_views.')
        views = outputs["view_2"]
        # A head of cosines computes in full precision in any case.
        bf16 = torch.bfloat16 in (outputs["logits"].dtype, outputs["embedding"].dtype)
        with torch.autocast(views.device.type, torch.bfloat16, enabled=bf16):
            return full_precision(self.key_encoder(views)["embedding"])

    @staticmethod
    def classifiers(target: Network) -> Tensor:
        """u (K, d+1), constant. A head without a bias has 0 in its place."""
        parameters = target.head_parameters()
        weight, bias = parameters[f"{target.head}.weight"], parameters.get(f"{target.head}.bias")
        column = weight.new_zeros(len(weight)) if bias is None else bias
        return F.normalize(torch.cat([weight, column[:, None]], dim=1)).detach()

    def contrast(self, positive: Tensor, queued: Tensor, labels: Tensor) -> Tensor:
        """KL(e || softmax(logits / T)), from the similarity with the key (B,) and with all queues (B, K * Q)."""
        logarithms: Tensor = (torch.cat([positive[:, None], queued], dim=1) / self.temperature).log_softmax(dim=1)
        of_class: Tensor = logarithms[:, 1:].unflatten(1, (-1, self.queue)).sum(dim=2).gather(1, labels[:, None])[:, 0]
        count = self.queue + 1
        return (-(logarithms[:, 0] + of_class) / count).mean() - math.log(count)

    @torch.no_grad()
    def enqueue(self, labels: Tensor, z: Tensor, g: Tensor) -> None:
        """Each key replaces the oldest of its class, in the order of the batch. Nothing waits for the device."""
        same = labels[:, None] == labels
        rank = same.tril(-1).sum(dim=1)  # among the images of its class in this batch
        # If a class has more than Q images, the last ones stay: all that write to a place write the same.
        shares = same & ((rank[:, None] - rank) % self.queue == 0)
        last = (shares * torch.arange(len(labels), device=labels.device)).argmax(dim=1)
        places = labels * self.queue + (self.position[labels] + rank) % self.queue
        self.queue_z.flatten(0, 1)[places] = z[last].to(self.queue_z)
        self.queue_g.flatten(0, 1)[places] = g[last].to(self.queue_g)
        self.position.index_add_(0, labels, torch.ones_like(labels)).remainder_(self.queue)


def with_one(features: Tensor) -> Tensor:
    """g = [h; 1] of unit length, (B, d) -> (B, d+1)."""
    return F.normalize(F.pad(features, (0, 1), value=1.0))
