"""LP-FT: linear probing, then fine-tuning (Kumar, Raghunathan, Jones, Ma, Liang, ICLR 2022)."""

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.options import LONGEST, OptionError, Options, option
from ..common.timing import seconds_of
from ..models import Network
from ..models.batchnorm import AnyBatchNorm, replace_batchnorm
from .attention import check_labels
from .base import DECAY, METHODS, NO_SHAPES, Batches, MapShapes, Needs, SourceShapes, WithoutPenalty, options_in

HELD_OUT = 5  # one in this many images of each class is held out to choose c


@dataclass
class ProbeConfig(Options):
    """The logistic regression on the source's embeddings that becomes the first head."""

    key: ClassVar[str] = "reg.probe"

    c: float | None = option(
        None,
        "weight of the summed cross-entropy against 1/2 ||W||^2; null: chosen on held-out training images",
        above=0,
    )
    choices: int = option(50, "number of values of c that are tried, from 1e-7 to 1e2", above=0, at_most=LONGEST)
    iterations: int = option(200, "maximum of L-BFGS iterations for each value of c", above=0, at_most=LONGEST)
    seed: int = option(0, "seed of the draw of the held-out images", at_least=0)


class FixedBatchNorm(AnyBatchNorm):
    """BatchNorm that uses its moving statistics in training too and never changes them; scale and shift are trained."""

    def forward(self, images: Tensor) -> Tensor:
        return F.batch_norm(images, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


@METHODS.register("lp_ft", "LP-FT")
class LPFT(WithoutPenalty):
    """1. Head = argmin_{W,b} c * sum CE(W h + b) + 1/2 ||W||^2 on the frozen source's embeddings h of centre crops.
    2. From there the whole network is trained on CE.

    Source: the paper and its code (AnanyaKumar/transfer_learning at 80bc68b, log_reg_sk.py). h is standardised by one
    mean and one standard deviation over all entries, which are folded into W and b afterwards. c is the best of 50
    values between 1e-7 and 1e2 on validation data, and the smallest of several that are equally good. Deviation: they
    have a validation set; here, where a data set has none, the validation data are every fifth training image of a
    class, drawn with probe.seed; the head is then fitted to all training images. In step 2 the authors use no weight
    decay, and BatchNorm in evaluation mode (fixed_statistics). They choose among 10 learning rates on validation data;
    that is left to you.

    Step 1 is computed once, before training, and takes no iterations of the schedule. Call `fit` or `load_fitted`
    before `setup`, which otherwise raises RuntimeError. `fit` raises OptionError if every class has only one image and
    no c is given.
    """

    weight_decay: float = option(0.0, DECAY, at_least=0)
    fixed_statistics: bool = option(True, "whether BatchNorm uses its moving statistics in training, too")
    probe: ProbeConfig = option(ProbeConfig, "the regression that gives the first head")

    needs = Needs(fitted="probe", fit_on="centre crops", one_label=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs = replace(type(self).needs, own_batchnorm=self.fixed_statistics)
        self.probe = options_in(ProbeConfig, self.probe)
        self.fit_seed = self.probe.seed

    def fit_options(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self.probe).items() if key != "seed"}

    @torch.no_grad()
    def fit(self, source: Network, batches: Batches, num_classes: int) -> dict[str, Tensor]:
        """The head, weight (K, d) and bias (K,), with the chosen c and its accuracy on held-out images, in percent."""
        counted = self.unfinished.counted("the source's features, image", batches)
        embedded = [(source(images)["embedding"], labels) for images, labels in counted]
        features, labels = (torch.cat(of_batches) for of_batches in zip(*embedded, strict=True))
        check_labels(labels, num_classes)
        mean, std = features.mean(), features.std(correction=0)
        features = (features - mean) / std
        c, report = self.probe.c, {}
        if c is None:
            c, accuracy = self._choose(features, labels, num_classes)
            report = {"c": torch.tensor(c), "held_out_top1": torch.tensor(accuracy)}
        weight, bias = logistic_regression(features, labels, num_classes, c, self.probe.iterations)
        weight = weight / std
        fitted = {"weight": weight, "bias": bias - mean * weight.sum(dim=1)} | report
        self.load_fitted(fitted)
        return fitted

    def _choose(self, features: Tensor, labels: Tensor, num_classes: int) -> tuple[float, float]:
        """The best c, and its accuracy on the held-out images in percent."""
        held = held_out(labels, self.probe.seed)
        if not held.any():
            key = f"reg.terms.{self.term}.probe.c" if self.term else "reg.probe.c"
            raise OptionError(
                key, f"{key}=null is chosen on held-out images, but every class has only one image: set a value."
            )
        best, chosen, head = -1.0, 0.0, None
        choices = torch.logspace(-7, 2, self.probe.choices, dtype=torch.float64).tolist()
        for number, c in enumerate(choices, 1):
            head = logistic_regression(features[~held], labels[~held], num_classes, c, self.probe.iterations, head)
            right = F.linear(features[held], *head).argmax(dim=1) == labels[held]
            accuracy = 100 * right.double().mean().item()
            if accuracy > best:
                best, chosen = accuracy, c
            self.unfinished.show("choosing c, value", number, len(choices))
        return chosen, best

    def estimate_fit(self, source: Network, images: Tensor, num_classes: int) -> tuple[dict[str, Tensor], float, float]:
        with torch.no_grad():
            features = source(images)["embedding"]
            seconds = seconds_of(lambda: source(images), images.device) / len(images)
        # The regressions themselves are not counted.
        return {"weight": features.new_zeros(num_classes, features.shape[1])}, seconds, 0.0

    def load_fitted(self, fitted: dict[str, Tensor]) -> None:
        self.fitted = {name: fitted[name] for name in ("weight", "bias") if name in fitted}
        self.fit_report = {name: float(f"{v.item():.4g}") for name, v in fitted.items() if name not in self.fitted}

    @torch.no_grad()
    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        if not self.fitted:
            raise RuntimeError("LP-FT has no probe: call fit() or load_fitted() before setup().")
        for name, parameter in target.traced.get_submodule(target.head).named_parameters():
            if name in self.fitted:  # a head of cosines has no bias
                parameter.copy_(self.fitted[name])
        if self.fixed_statistics:
            replace_batchnorm(target.traced, FixedBatchNorm)


@torch.enable_grad()
def logistic_regression(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    c: float,
    iterations: int,
    begin: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """argmin_{W,b} c * sum CE(W h + b) + 1/2 ||W||^2 for features (N, d), by L-BFGS: W (K, d) and b (K,)."""
    begin = begin or (features.new_zeros(num_classes, features.shape[1]), features.new_zeros(num_classes))
    weight, bias = (values.detach().clone().requires_grad_(True) for values in begin)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        # Divided by c N where that is large, so that tolerances mean the same for every c.
        task = F.cross_entropy(F.linear(features, weight, bias), labels)
        scale = c * len(labels)
        total = (scale * task + 0.5 * weight.square().sum()) / max(scale, 1.0)
        total.backward()
        return total

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def held_out(labels: Tensor, seed: int) -> Tensor:
    """Mask (N,) of the held-out images: one in HELD_OUT of each class, rounded up, but never a class's only image."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    held = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        images = order[labels[order] == label]
        if len(images) > 1:
            held[images[: -(-len(images) // HELD_OUT)]] = True
    return held
