"""Methods that train a few of the backbone's parameters as they are: BitFit and LN-tune."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..common.errors import UserError
from ..models import Network
from .base import METHODS, NO_SHAPES, MapShapes, SourceShapes, WithoutPenalty

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class PartialTuning(WithoutPenalty):
    """Fine-tuning of the head and of those parameters of the backbone that `chosen` names; all others are frozen.

    BatchNorm normalises by the batch and moves its statistics, as in fine-tuning. The chosen parameters have the
    learning rate of the backbone, and need a larger one than a whole network does.
    """

    what = ""  # what is trained, in words

    def chosen(self, model: nn.Module) -> set[str]:
        """The names of the chosen parameters of `model`, those of its head among them."""
        raise NotImplementedError

    def requires(self, model: nn.Module, optimizer: str, processes: int) -> None:
        if not self.chosen(model):
            raise UserError(f"{type(self).__name__} would do nothing: this network has no {self.what}.")

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        chosen = self.chosen(target.model)
        parameters = target.backbone_parameters()
        if not chosen.intersection(parameters):
            raise UserError(f"{type(self).__name__} would train the head alone: the backbone has no {self.what}.")
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)


@METHODS.register("bitfit", "BitFit")
class BitFit(PartialTuning):
    """Loss = CE; the head and all biases of the backbone are trained, those of normalisation layers among them.

    Source: Ben Zaken, Goldberg, Ravfogel, ACL 2022. Weight decay is that of L2. `setup` raises UserError if the
    backbone has no biases.
    """

    what = "biases"

    def chosen(self, model: nn.Module) -> set[str]:
        return {name for name, p in model.named_parameters() if name.endswith("bias") and p.dim() == 1}


@METHODS.register("ln_tune", "LN-tune")
class LNTune(PartialTuning):
    """Loss = CE; the head and the parameters of all normalisation layers are trained: scales and shifts.

    Layers are LayerNorm, GroupNorm, RMSNorm and every kind of BatchNorm. Source: the norm tuning that
    OSU-MLB/ViT_PEFT_Vision at 344d82a compares (Mai et al., CVPR 2025), there LayerNorm of ViTs. Weight decay is that
    of L2. `setup` raises UserError if the backbone has no such layers.
    """

    what = "normalisation layers with parameters"

    def chosen(self, model: nn.Module) -> set[str]:
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, NORMS)]
        return {name for place, layer in layers for name, _ in layer.named_parameters(place)}
