"""A trained network as a file for other programs, and the file's own outputs, to compare."""

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout

import torch
from safetensors.torch import load
from torch import Tensor, nn

from ..common.errors import UserError
from ..records.checked import save_with_checksum
from ..records.weights import StateDict
from .zoo import BackboneConfig, construct

TOLERANCE = 1e-4  # of the largest logit, or of 1: the effect of another order of additions


class Normalised(nn.Module):
    """RGB in 0..1, (B, 3, H, W) -> logits (B, K) of a network that was trained on normalised images."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def some_images(count: int, size: int) -> Tensor:
    """Coarse and fine noise, (count, 3, size, size) in 0..1, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(count, 3, size, size, generator=generator)
    coarse = nn.functional.interpolate(torch.rand(count, 3, 4, 4, generator=generator), size, mode="bilinear")
    return torch.where(torch.arange(count).view(-1, 1, 1, 1) % 2 == 0, coarse, fine)


def as_safetensors(network: Normalised, size: int, metadata: dict[str, str]) -> bytes:
    """The state dict under the network's own parameter names, without the normalisation."""
    return file_of(network.network, metadata)


def file_of(network: nn.Module, metadata: dict[str, str]) -> bytes:
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    return save_with_checksum(weights, metadata | {"format": "pt"})


def as_torch_export(network: Normalised, size: int, metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_program(network, size), buffer, extra_files=metadata)
    return buffer.getvalue()


def as_onnx(network: Normalised, size: int, metadata: dict[str, str]) -> bytes:
    """An ONNX file with the input `images` and the output `logits`."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the packages onnx and onnxscript ({error}): pip install 'delta-transfer[export]'."
        ) from None
    program = _program(network, size)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it prints a line for each of its steps
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: "batch"}},
        )
    assert made is not None
    model = made.model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def _program(network: Normalised, size: int) -> torch.export.ExportedProgram:
    shapes = {"images": {0: torch.export.Dim("batch")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(network, (some_images(2, size),), dynamic_shapes=shapes)


def logits_of_safetensors(data: bytes, images: Tensor, network: Normalised, backbone: BackboneConfig) -> Tensor:
    """The logits of a new network into which the file was loaded strictly."""
    weights: StateDict = load(data)
    loaded = bare_network(backbone, len(network(images)[0]), weights)
    return Normalised(loaded, network.mean.flatten().tolist(), network.std.flatten().tolist())(images)


def logits_of_torch_export(data: bytes, images: Tensor, network: Normalised, backbone: BackboneConfig) -> Tensor:
    return torch.export.load(io.BytesIO(data)).module()(images)


def logits_of_onnx(data: bytes, images: Tensor, network: Normalised, backbone: BackboneConfig) -> Tensor | None:
    """None if onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


# Format: what makes the file, what computes with it.
FORMATS = {
    "safetensors": (as_safetensors, logits_of_safetensors),
    "onnx": (as_onnx, logits_of_onnx),
    "torch-export": (as_torch_export, logits_of_torch_export),
}


def bare_network(config: BackboneConfig, num_classes: int, state: StateDict) -> nn.Module:
    """The network as its library builds it, in evaluation mode. `state` must fit exactly, and is not copied.

    Raises UserError for a name that no library has, RuntimeError for a state of another network.
    """
    options = options_for(config.name, state)
    try:
        with torch.device("meta"):  # saves the time to draw random weights
            model = construct(config, num_classes, **options)
    except NotImplementedError:  # as in `untrained`
        model = construct(config, num_classes, **options)
    model.load_state_dict(state, strict=True, assign=True)
    if any(buffer.is_meta and name not in state for name, buffer in model.named_buffers()):
        model = construct(config, num_classes, **options)  # has values that are not part of a state
        model.load_state_dict(state, strict=True)
    return model.float().eval().requires_grad_(False)


def options_for(name: str, state: StateDict) -> dict[str, float]:
    """Arguments of torchvision's constructor with which `state` fits: files leave out auxiliary branches."""
    has_aux = any(key.startswith(("AuxLogits.", "aux1.")) for key in state)
    return {"aux_logits": False} if name in ("inception_v3", "googlenet") and not has_aux else {}


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of logits as a fraction of the largest logit (or of 1); NaN if any is not finite."""
    if found.shape != expected.shape:
        return float("nan")
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
