"""L2-SP-Fisher: L2-SP, but what matters to the source is held faster (Li, Grandvalet, Davoine, ICML 2018)."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..common.hardware import seconds_of
from ..config import FisherConfig
from ..models import Network
from .attention import samples
from .base import NO_SHAPES, Batches, MapShapes, Outputs, OutputShapes, not_negative, one_of
from .distances import weight_distance
from .l2_sp import L2SP


class L2SPFisher(L2SP):
    """Omega = 1/2 * sum_j (F_j + eps) (p_j - p0_j)^2, loss = CE + alpha * Omega + beta/2 * ||head||^2.

    j runs over the entries of all convolution kernels, p0 are their values in the source network, F is the diagonal of
    the source's Fisher information. form="min": the weight is min(F_j, eps). Source: the L2-SP authors' code
    (holyseven/TransferLearningClassification), whose eps is 0; they leave the head's bias out of the beta term.

    Their F has to be supplied, and no estimator is published. Here F_j = mean_x (d log p(y | x) / d p_j)^2 over
    `fisher.images` training crops of the target's data, of each image its own gradient, with y drawn from the source's
    own softmax p(. | x) and BatchNorm in evaluation mode: an estimate without bias of the Fisher information, but on
    the target's images. F has another scale than 1: alpha means something else than for L2-SP. Choose it on validation
    data. Call `fit` or `load_fitted` before `start`.
    """

    fitted_name = "fisher"

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.01,
        weight_decay: float = 0.0,
        form: str = "add",
        eps: float = 0.0,
        fisher: FisherConfig | None = None,
    ):
        super().__init__(alpha, beta, weight_decay, scope="conv")
        not_negative(eps=eps)
        self.form, self.eps = one_of("form", form, "add", "min"), eps
        self.fisher = fisher or FisherConfig()
        self.fit_seed = self.fisher.seed
        self.information: dict[str, Tensor] = {}
        self.roots: list[Tensor] = []

    def fit_options(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self.fisher).items() if key != "seed"}

    def fit(self, source: Network, batches: Batches, num_classes: int) -> dict[str, Tensor]:
        """F of every convolution kernel, {name: (O, I, h, w)}."""
        network, kernels = _differentiable(source)
        squares = [torch.zeros_like(p) for p in kernels.values()]
        generator = torch.Generator().manual_seed(self.fisher.seed)
        for image, _ in samples(batches, self.fisher.images, at_once=1):
            torch._foreach_addcmul_(squares, *2 * [_gradient(network, kernels, image, generator)])
        torch._foreach_div_(squares, self.fisher.images)
        fitted = {name: square.contiguous() for name, square in zip(kernels, squares, strict=True)}
        self.load_fitted(fitted)
        return fitted

    def rehearse(self, source: Network, images: Tensor, num_classes: int) -> tuple[dict[str, Tensor], float, float]:
        network, kernels = _differentiable(source)
        seconds = seconds_of(lambda: _gradient(network, kernels, images[:1], torch.Generator()), images.device)
        return {name: torch.ones_like(p) for name, p in kernels.items()}, 0.0, self.fisher.images * seconds

    def load_fitted(self, fitted: dict[str, Tensor]) -> None:
        self.information = dict(fitted)

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        super().start(target, map_shapes, source_shapes)
        if self.starting_point.keys() - self.information.keys():
            raise RuntimeError("L2-SP-Fisher has no Fisher information: call fit() or load_fitted() before start().")
        self.roots = []
        for name, p in self.starting_point.items():
            information = self.information[name]
            weight = information + self.eps if self.form == "add" else information.clamp(max=self.eps)
            self.roots.append(torch.empty_like(p).copy_(weight.sqrt()))  # in the order of p's memory

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        if self.starting_point is None:
            raise RuntimeError("L2-SP-Fisher has no starting point: call start() before penalty().")
        parameters = target.backbone_parameters()
        kernels = [parameters[name] for name in self.starting_point]
        omega = weight_distance(kernels, list(self.starting_point.values()), self.roots)
        return {"weights": self.alpha * omega} | self.head_penalty(target)


def _differentiable(source: Network) -> tuple[Network, dict[str, Tensor]]:
    """A copy in evaluation mode, of which the convolution kernels alone have gradients."""
    network = source.copy().freeze()
    kernels = {name: p.requires_grad_(True) for name, p in network.backbone_parameters().items() if p.dim() == 4}
    return network, kernels


def _gradient(network: Network, kernels: dict[str, Tensor], image: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Of log p(y | image) with y drawn from p; image (1, 3, H, W)."""
    logarithms = network(image)["logits"][0].log_softmax(dim=0)
    label = torch.multinomial(logarithms.detach().exp().cpu(), 1, generator=generator).item()
    # A branch that is left out has no part in p(y | x).
    gradients = torch.autograd.grad(logarithms[label], list(kernels.values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, kernels.values(), strict=True)]
