"""LwF: learning without forgetting (Li, Hoiem, ECCV 2016), towards a source of any architecture."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Network
from .base import NO_SHAPES, MapShapes, Outputs, OutputShapes, Regularizer, module_name, not_negative, of_source
from .distances import full_precision


class LwF(Regularizer):
    """D = 2 alpha T^2 * mean KL(softmax(z / T) || softmax(h(e) / T)), loss = CE + D + beta/2 * ||head||^2.

    z: the source's logits for the images, (B, K). h: a linear layer of its own with K outputs, trained with the target,
    on the embedding e, which is what the target's head is given. The mean is over all B * K elements; T is the
    temperature. With several sources each has an h, and D is the sum.

    The utility in the L2T-ww authors' code also weighs CE by 1 - a. Here CE has the weight 1, as in every method, and
    alpha weighs the KL alone, so that penalties can be added: theirs is 1 - a times this loss at alpha = a / (1 - a),
    which amounts to another learning rate and weight decay. Neither a nor T was found for their baseline: tune alpha
    and T on validation data.
    """

    needs_source = True
    needs_source_logits = True
    any_source = True

    def __init__(self, alpha: float = 1.0, beta: float = 0.0, weight_decay: float = 1e-4, temperature: float = 2.0):
        super().__init__(beta=beta, weight_decay=weight_decay)
        not_negative(alpha=alpha)
        self.alpha, self.temperature = alpha, temperature
        self.heads = nn.ModuleDict()
        self.names: dict[str, str] = {}  # of the source's logits in its outputs, by head

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        logits = {key: shape[0] for key, shape in (source_shapes or {}).items() if len(shape) == 1}
        if not logits:
            raise ValueError("LwF needs to know how many logits the source has: source_shapes={'logits': (K,)}.")
        features = target.head_parameters()[f"{target.head}.weight"].shape[1]
        self.heads = nn.ModuleDict({module_name(key): nn.Linear(features, count) for key, count in logits.items()})
        self.names = {module_name(key): key for key in logits}

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs) -> dict[str, Tensor]:
        embedding, total, source_outputs = full_precision(outputs["embedding"]), 0.0, of_source(source_outputs)
        for key, head in self.heads.items():
            expected = full_precision(source_outputs[self.names[key]].detach()) / self.temperature
            found = head(embedding) / self.temperature
            total = total + mean_divergence(expected.log_softmax(dim=1), found.log_softmax(dim=1))
        return {"distillation": 2 * self.alpha * self.temperature**2 * total} | self.head_penalty(target)


def mean_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) of logarithms of probabilities (B, K), as a mean over all elements."""
    return F.kl_div(found, expected, reduction="sum", log_target=True) / found.numel()
