"""Other BatchNorm layers in the place of a network's own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class AnyBatchNorm(_BatchNorm):
    """BatchNorm of values (B, C, ...) with any further axes, such as pixels, or none, as for nodes."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def sharing(module: _BatchNorm, made: _BatchNorm) -> _BatchNorm:
    """`made`, which shares the parameters and statistics of `module`.

    timm's layers also drop and activate (BatchNormAct2d); `made` does so, too.
    """
    made.train(module.training)
    made.eps, made.momentum = module.eps, module.momentum
    made.weight, made.bias = module.weight, module.bias
    for name, buffer in module.named_buffers(recurse=False):
        setattr(made, name, buffer)
    inside = dict(module.named_children())
    if inside:
        for name, child in inside.items():  # "drop" and "act", in this order
            made.add_module(name, child)
        made.register_forward_hook(_then)
    return made


def _then(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    for child in module.children():
        output = child(output)
    return output


def replace_batchnorm(network: nn.Module, make: Callable[..., _BatchNorm], **options) -> None:
    """Replaces BatchNorm in a traced network. The original model keeps its layers, and shares their values."""
    for name, module in list(network.named_modules()):
        if isinstance(module, _BatchNorm):
            network.set_submodule(name, sharing(module, make(module.num_features, **options)))
