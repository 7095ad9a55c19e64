"""Other BatchNorm layers in the place of a network's own."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def sharing(module: _BatchNorm, made: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """`made`, with the parameters and statistics of `module`: what changes one changes the other."""
    made.train(module.training)
    made.eps, made.momentum = module.eps, module.momentum
    made.weight, made.bias = module.weight, module.bias
    for name, buffer in module.named_buffers():
        setattr(made, name, buffer)
    return made


def replace_batchnorm(network: nn.Module, make: type[nn.BatchNorm2d], **options) -> None:
    """In a traced network: the model that it was traced from keeps its layers, and shares their values."""
    for name, module in list(network.named_modules()):
        if isinstance(module, _BatchNorm):
            network.set_submodule(name, sharing(module, make(module.num_features, **options)))
