"""LwF: learning without forgetting (Li, Hoiem, ECCV 2016), for a source of any architecture."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from ..common.options import option
from ..models import Network
from .base import (
    DECAY,
    METHODS,
    NO_SHAPES,
    Batches,
    MapShapes,
    Needs,
    Outputs,
    Penalty,
    SourceShapes,
    added,
    full_precision,
    module_name,
    of_source,
)


@METHODS.register("lwf", "LwF")
class LwF(Penalty):
    """D = 2 alpha T^2 * mean KL(softmax(z / T) || softmax(h(e) / T)), loss = CE + D + beta/2 * ||head||^2.

    z are the source's logits for the images, (B, K). The embedding e is the input of the target's head. h is a linear
    layer with K outputs, which belongs to the method and is trained with the target. The mean is over all B * K
    elements; T is the temperature. With several sources each has its own h, and D is the sum.

    head="source": h is the source's own head, frozen, for a target that starts from the source's weights. This is the
    method of the paper and of thuml/Transfer-Learning-Library at 2367699 (lwf.py of its examples), whose loss is lam *
    KL with lam 4 and T 3, a mean over the batch without T^2. It equals D with alpha = lam K / (2 T^2). Deviation: that
    library stores z of one crop of each image once and compares it with the logits of other crops; here z belongs to
    the crop that the target sees, so that both networks judge the same pixels.

    The utility in the L2T-ww authors' code (alinlab/L2T-ww at 6883556, utils/utils.py, in its git history only) also
    multiplies CE by 1 - a. Here CE has the weight 1, as in every method, and alpha multiplies the KL alone, so that
    penalties can be added. Their loss is 1 - a times this one at alpha = a / (1 - a), which amounts to another learning
    rate and weight decay. Neither a nor T was found for their baseline: tune alpha and T on validation data.

    Call `setup(target, {}, {"logits": (K,)})` before training; it raises ValueError without the shape of the logits.
    With head="source" call `fit` or `load_fitted` before it. Another order raises RuntimeError. `penalty` returns the
    terms "distillation" and "head".
    """

    alpha: float = option(1.0, "strength of the distillation; not published for this comparison", at_least=0)
    weight_decay: float = option(1e-4, DECAY, at_least=0)
    temperature: float = option(2.0, "temperature of the softmax over both networks' logits", above=0)
    head: str = option(
        "new",
        "what predicts the source's logits: new, a layer that is trained; source, the source's own head, frozen",
        choices=("new", "source"),
    )

    needs = Needs(source=True, source_logits=True, source_head=True, other_sources=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head == "source":
            self.needs = replace(type(self).needs, other_sources=False, fitted="source_head", fit_on="centre crops")
        self.heads = nn.ModuleDict()
        self.names: dict[str, str] = {}  # by head, the name of its logits among the source's outputs

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        logits = {key: shape[0] for key, shape in (source_shapes or {}).items() if len(shape) == 1}
        if not logits:
            raise ValueError("LwF needs to know how many logits the source has: source_shapes={'logits': (K,)}.")
        if self.head == "source":
            if not self.fitted:
                raise RuntimeError("LwF has no head of the source: call fit() or load_fitted() before setup().")
            weight, bias = self.fitted["weight"], self.fitted.get("bias")
            head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight)
            head.load_state_dict(self.fitted)
            self.heads, self.names = nn.ModuleDict({"logits": head.requires_grad_(False)}), {"logits": "logits"}
            return
        features = target.head_parameters()[f"{target.head}.weight"].shape[1]
        self.heads = nn.ModuleDict({module_name(key): nn.Linear(features, count) for key, count in logits.items()})
        self.names = {module_name(key): key for key in logits}

    def fit(self, source: Network, batches: Batches, num_classes: int) -> dict[str, Tensor]:
        """Weight (K, D) and bias (K,) of the source's head. It looks at no image."""
        head = source.traced.get_submodule(source.head)
        fitted = {name: p.detach().clone() for name, p in head.named_parameters()}
        self.load_fitted(fitted)
        return fitted

    def estimate_fit(self, source: Network, images: Tensor, num_classes: int) -> tuple[dict[str, Tensor], float, float]:
        return self.fit(source, [], num_classes), 0.0, 0.0

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        if not self.heads:
            raise RuntimeError("LwF has no head for the source's logits: call setup() before penalty().")
        embedding, source_outputs = full_precision(outputs["embedding"]), of_source(source_outputs)
        divergences = []
        for key, head in self.heads.items():
            expected = (full_precision(source_outputs[self.names[key]].detach()) / self.temperature).log_softmax(dim=1)
            found = (head(embedding) / self.temperature).log_softmax(dim=1)
            divergences.append(F.kl_div(found, expected, reduction="sum", log_target=True) / found.numel())
        loss = 2 * self.alpha * self.temperature**2 * added(divergences)
        return {"distillation": loss} | self.head_penalty(target)
