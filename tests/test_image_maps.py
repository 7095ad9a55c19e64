"""Grad-CAM as the package makes it on traced networks, against a computation by hand."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from delta_transfer.common.errors import UserError
from delta_transfer.inspect.image_maps import grad_cam, grad_cam_package, in_own_range, maps_of, with_last_map
from delta_transfer.models import Network
from delta_transfer.models.zoo import SmallResNet

from .conftest import randomise_batchnorm

needs_grad_cam = pytest.mark.skipif("not __import__('importlib').util.find_spec('pytorch_grad_cam')")


@needs_grad_cam
def test_grad_cam_is_the_gradient_weighted_sum(tiny_source):
    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    classes = np.array([2, 0, 3])
    layers = tiny_source.traced
    first = F.relu(layers.bn1(layers.conv1(images)))
    last = F.relu(layers.bn2(layers.conv2(first)) + first).detach().requires_grad_(True)
    logits = layers.fc(last.mean(dim=(2, 3)))
    torch.testing.assert_close(logits, tiny_source(images)["logits"])
    (gradient,) = torch.autograd.grad(logits[range(3), classes].sum(), last)
    by_hand = F.relu((gradient.mean(dim=(2, 3), keepdim=True) * last).sum(dim=1)).detach().numpy()
    assert all(by_hand.max(axis=(1, 2)) > 0)  # a map of zeros would prove nothing
    np.testing.assert_allclose(grad_cam(tiny_source, images, classes), in_own_range(by_hand), atol=1e-5)


@needs_grad_cam
def test_grad_cam_is_enlarged_to_the_image():
    torch.manual_seed(0)
    model = SmallResNet(num_classes=5)
    randomise_batchnorm(model)
    network = Network(model, head="fc", taps=("layer3",)).freeze()
    images = torch.randn(2, 3, 32, 32)
    last = network(images)["layer3"].detach().requires_grad_(True)
    logits = network.traced.fc(last.mean(dim=(2, 3)))
    (gradient,) = torch.autograd.grad(logits[:, 4].sum(), last)
    small = F.relu((gradient.mean(dim=(2, 3), keepdim=True) * last).sum(dim=1, keepdim=True)).detach()
    assert small.shape == (2, 1, 4, 4) and all(small.amax(dim=(1, 2, 3)) > 0)
    by_hand = in_own_range(F.interpolate(small, (32, 32), mode="bilinear")[:, 0].numpy())
    np.testing.assert_allclose(in_own_range(grad_cam(network, images, np.array([4, 4]))), by_hand, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "head", "last", "size"),
    [
        ("resnet18", "fc", "layer4", 64),
        ("mobilenet_v2", "classifier.1", "features.18", 64),
        ("inception_v3", "fc", "Mixed_7c", 139),
    ],
)
def test_the_last_map_is_the_one_before_the_pooling(name, head, last, size):
    options = {"init_weights": False} if name == "inception_v3" else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    network = Network(model, head=head, taps=(last,)).freeze()
    images = torch.randn(2, 3, size, size)
    traced, layer = with_last_map(network, images[:1])
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = traced(images)
    expected = network(images)
    torch.testing.assert_close(logits, expected["logits"])
    assert len(seen) == 1 and seen[0].shape[2] > 1
    torch.testing.assert_close(seen[0], expected[last])


def test_a_network_without_positions_is_refused():
    network = Network(SmallResNet(5), head="fc", taps=("layer3",)).freeze()
    with pytest.raises(UserError, match="more than one position"):
        with_last_map(network, torch.zeros(1, 3, 2, 2))


def test_each_map_has_its_own_range():
    maps = np.array([[[1.0, 3.0], [2.0, 1.0]], [[4.0, 4.0], [4.0, 4.0]]])
    np.testing.assert_array_equal(in_own_range(maps), [[[0, 1], [0.5, 0]], [[0, 0], [0, 0]]])


@needs_grad_cam
def test_maps_of_an_image_do_not_depend_on_the_others(tiny_source, monkeypatch):
    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    activation, cam, logits = maps_of(tiny_source, images, None)
    expected = tiny_source(images)
    np.testing.assert_allclose(logits, expected["logits"].numpy(), rtol=1e-5)
    np.testing.assert_allclose(activation, in_own_range(expected["conv2"].abs().mean(dim=1).numpy()), atol=1e-5)
    np.testing.assert_allclose(cam, grad_cam(tiny_source, images, logits.argmax(axis=1)), atol=1e-5)
    monkeypatch.setattr("delta_transfer.inspect.image_maps.AT_ONCE", 2)
    for one, other in zip(maps_of(tiny_source, images, None), (activation, cam, logits), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(UserError, match=r"pip install 'delta-transfer\[report\]'"):
        grad_cam_package()
