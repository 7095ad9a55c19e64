"""Maps of a network for single images: activation, saliency, and Grad-CAM by the package grad-cam."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..common.errors import UserError
from ..models import Network

COLOURS = matplotlib.colormaps["inferno"]
AT_ONCE = 8  # images that go through a network together when gradients are computed, to bound memory


def maps_of(network: Network, images: Tensor, classes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activation maps and Grad-CAM of images (N, 3, H, W), each (N, H, W) in 0..1, and logits (N, K), all in fp32.

    Activation: mean over channels of |F| at the last tap. Grad-CAM: for `classes` (N,); None: for the predicted ones.
    """
    activations, cams, logits = [], [], []
    for start in range(0, len(images), AT_ONCE):
        batch = images[start : start + AT_ONCE]
        with torch.no_grad():
            maps = network(batch)
        activations.append(enlarged(maps[network.taps[-1]].abs().mean(dim=1), batch))
        logits.append(maps["logits"].cpu().numpy())
        wanted = logits[-1].argmax(axis=1) if classes is None else classes[start : start + AT_ONCE]
        cams.append(grad_cam(network, batch, wanted))
    return in_own_range(np.concatenate(activations)), in_own_range(np.concatenate(cams)), np.concatenate(logits)


def saliency(network: Network, images: Tensor, classes: np.ndarray, std: Sequence[float]) -> np.ndarray:
    """(N, H, W) in 0..1: max over colours of |d logit of `classes` (N,) / d pixel| (Simonyan et al. 2014), blurred.

    images: pixels divided by `std` (3 values), up to a constant. The blur is Gaussian, with 1/64 of the side.
    """
    scale = torch.tensor(std, device=images.device).view(3, 1, 1)
    slopes = []
    for start in range(0, len(images), AT_ONCE):
        batch = images[start : start + AT_ONCE].clone().requires_grad_(True)
        logits = network(batch)["logits"]
        wanted = torch.as_tensor(classes[start : start + AT_ONCE], device=logits.device).long()
        (gradient,) = torch.autograd.grad(logits.gather(1, wanted[:, None]).sum(), batch)
        slopes.append((gradient / scale).abs().amax(dim=1).cpu().numpy())
    width = images.shape[-1] / 64
    return in_own_range(gaussian_filter(np.concatenate(slopes), (0, width, width)))


def enlarged(maps: Tensor, images: Tensor) -> np.ndarray:
    """(N, h, w) -> (N, H, W) of the images, bilinear."""
    return F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")[:, 0].cpu().numpy()


def in_own_range(maps: np.ndarray) -> np.ndarray:
    """Scales each of the maps (N, H, W) to a minimum of 0 and a maximum of 1; a constant one becomes 0."""
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    return (maps - low) / np.where(high > low, high - low, 1)


def overlaid(pixels: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Maps (..., H, W) in 0..1 in colour over the image `pixels` (H, W, 3) in grey: (..., H, W, 3) in 0..1."""
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return 0.4 * grey[..., None] + 0.6 * COLOURS(maps)[..., :3]


def grad_cam_package() -> tuple[Any, Any]:
    """GradCAM and ClassifierOutputTarget of the package grad-cam. Raises UserError if it is not installed."""
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise UserError(
            f"Pictures need the package grad-cam ({error}): pip install 'delta-transfer[report]'."
        ) from None
    return GradCAM, ClassifierOutputTarget


def grad_cam(network: Network, images: Tensor, classes: np.ndarray) -> np.ndarray:
    """(N, H, W) in 0..1, bilinearly enlarged: relu of the weighted sum of the channels of the last feature map.

    A channel's weight is the mean over positions of the gradient of the logit of `classes` (N,) (Selvaraju et al. 2017,
    equations 1 and 2). Raises UserError as `with_last_map` does.
    """
    GradCAM, ClassifierOutputTarget = grad_cam_package()
    model, layer = with_last_map(network, images[:1])
    cam = GradCAM(model=model, target_layers=[layer])  # not in a `with`, where it would hide an IndexError
    targets = [ClassifierOutputTarget(int(k)) for k in classes]
    # The network is frozen, so the images must have a gradient for anything to be differentiated.
    return cam(images.clone().requires_grad_(True), targets)


def with_last_map(network: Network, image: Tensor) -> tuple[fx.GraphModule, nn.Module]:
    """A copy that maps images to logits, and the module in it that returns the last feature map before the pooling.

    That map is the last value on the way to the head with more than one position. The module is an identity that is
    added here, since a block may return a sum or a concatenation, and its last ReLU may be used in several places.
    Only the size of `image`, (1, 3, H, W), matters. Raises UserError if no value has more than one position.
    """
    traced = fx.symbolic_trace(network.copy().freeze().traced)
    graph = traced.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = (output.args[0]["logits"],)
    graph.eliminate_dead_code()
    with torch.no_grad():
        ShapeProp(traced).propagate(image)
    node = output.args[0]
    while node.op != "placeholder" and not has_positions(node):
        node = node.all_input_nodes[0]
    if node.op == "placeholder":
        raise UserError("Grad-CAM needs a feature map with more than one position; this network has none.")
    traced.add_submodule("last_map", nn.Identity())
    with graph.inserting_after(node):
        marked = graph.call_module("last_map", (node,))
    node.replace_all_uses_with(marked, delete_user_cb=lambda user: user is not marked)
    traced.recompile()
    return traced, traced.get_submodule("last_map")


def has_positions(node: fx.Node) -> bool:
    meta = node.meta.get("tensor_meta")
    return meta is not None and len(meta.shape) == 4 and meta.shape[2] * meta.shape[3] > 1
