"""L2-SP-Fisher: L2-SP with a stronger penalty on weights that matter more to the source.

Li, Grandvalet, Davoine, ICML 2018.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..common.options import LONGEST, Options, option
from ..common.timing import seconds_of
from ..models import Network
from .attention import samples
from .base import METHODS, NO_SHAPES, Batches, MapShapes, Needs, Outputs, SourceShapes, options_in
from .l2_sp import HeldWeights


@dataclass
class FisherConfig(Options):
    """How the source's Fisher information is estimated."""

    key: ClassVar[str] = "reg.fisher"

    images: int = option(256, "training images on which it is estimated", above=0, at_most=LONGEST)
    seed: int = option(0, "seed of the images' order, crops and drawn labels; independent of the run's", at_least=0)


@METHODS.register("l2_sp_fisher", "L2-SP-Fisher")
class L2SPFisher(HeldWeights):
    """Omega = 1/2 * sum_j (F_j + eps) (p_j - p0_j)^2, loss = CE + alpha * Omega + beta/2 * ||head||^2.

    j runs over the entries of all convolution kernels; p0 are their values in the source network; F is the diagonal of
    the source's Fisher information. With form="min" the weight is min(F_j, eps). Source: the L2-SP authors' code
    (holyseven/TransferLearningClassification at 1426356, model/network_base.py), whose eps is 0. Deviation: they leave
    the head's bias out of the beta term; here that term includes it, as for every method.

    Deviation: the authors' code reads F from a file, and they publish no estimator. Here F_j = mean_x (d log p(y | x) /
    d p_j)^2 over `fisher.images` training crops of the target's data. Each image has a gradient of its own, with
    BatchNorm in evaluation mode, and y is drawn from the source's own softmax p(. | x). This estimates the Fisher
    information without bias, but on the target's images. The scale of F is not 1, so that alpha does not mean what it
    means for L2-SP: choose it on validation data. Call `fit` or `load_fitted` before `setup`, which otherwise raises
    RuntimeError. `penalty` returns the terms "weights" and "head".
    """

    alpha: float = option(1.0, "strength of the penalty; not on L2-SP's scale", at_least=0)
    form: str = option(
        "add", "weight of an entry with Fisher information F: add, F + eps, or min, min(F, eps)", choices=("add", "min")
    )
    eps: float = option(0.0, "eps of `form`; 0 in the authors' code", at_least=0)
    fisher: FisherConfig = option(FisherConfig, "how the Fisher information is estimated")

    needs = Needs(fitted="fisher", images=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fisher = options_in(FisherConfig, self.fisher)
        self.fit_seed = self.fisher.seed
        self.roots: list[Tensor] = []

    def check(self) -> None:
        self.require(
            self.form == "add" or self.eps > 0, "eps", "reg.form=min with reg.eps=0 is no penalty: set reg.eps."
        )

    def fit_options(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self.fisher).items() if key != "seed"}

    def fit(self, source: Network, batches: Batches, num_classes: int) -> dict[str, Tensor]:
        """F of every convolution kernel, {name: (O, I, h, w)}."""
        network, kernels = _differentiable(source)
        squares = [torch.zeros_like(p) for p in kernels.values()]
        generator = torch.Generator().manual_seed(self.fisher.seed)
        for number, (image, _) in enumerate(samples(batches, self.fisher.images, at_once=1), 1):
            gradient = _gradient(network, kernels, image, generator)
            torch._foreach_addcmul_(squares, gradient, gradient)
            self.unfinished.show("gradients, image", number, self.fisher.images)
        torch._foreach_div_(squares, self.fisher.images)
        fitted = {name: square.contiguous() for name, square in zip(kernels, squares, strict=True)}
        self.load_fitted(fitted)
        return fitted

    def estimate_fit(self, source: Network, images: Tensor, num_classes: int) -> tuple[dict[str, Tensor], float, float]:
        network, kernels = _differentiable(source)
        seconds = seconds_of(lambda: _gradient(network, kernels, images[:1], torch.Generator()), images.device)
        return {name: torch.ones_like(p) for name, p in kernels.items()}, 0.0, self.fisher.images * seconds

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        super().setup(target, map_shapes, source_shapes)
        starting_point = self.starting_point or {}
        if starting_point.keys() - self.fitted.keys():
            raise RuntimeError("L2-SP-Fisher has no Fisher information: call fit() or load_fitted() before setup().")
        self.roots = []
        for name, p in starting_point.items():
            information = self.fitted[name]
            weight = information + self.eps if self.form == "add" else information.clamp(max=self.eps)
            self.roots.append(torch.empty_like(p).copy_(weight.sqrt()))  # in the order of p's memory

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        return {"weights": self.alpha * self.distance(target, self.roots)} | self.head_penalty(target)


def _differentiable(source: Network) -> tuple[Network, dict[str, Tensor]]:
    """A copy in evaluation mode, in which only the convolution kernels have gradients."""
    network = source.copy().freeze()
    kernels = {name: p.requires_grad_(True) for name, p in network.backbone_parameters().items() if p.dim() == 4}
    return network, kernels


def _gradient(network: Network, kernels: dict[str, Tensor], image: Tensor, generator: torch.Generator) -> list[Tensor]:
    """The gradient of log p(y | image), with y drawn from p, by each kernel; image (1, 3, H, W)."""
    logarithms = network(image)["logits"][0].log_softmax(dim=0)
    label = int(torch.multinomial(logarithms.detach().exp().cpu(), 1, generator=generator))
    # A branch that is left out has no part in p(y | x).
    gradients = torch.autograd.grad(logarithms[label], list(kernels.values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, kernels.values(), strict=True)]
