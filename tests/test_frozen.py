"""The frozen source network at less cost returns the same maps."""

import pytest
import torch
import torchvision
from torch import nn

from delta_transfer.models import Network
from delta_transfer.models.frozen import frozen_backbone, frozen_maps

from .conftest import randomise_batchnorm

NETWORKS = {
    "resnet18": ("fc", ("layer1.1.conv2", "layer2.1.conv2", "layer4.1.conv2"), 48, 2),
    "resnet50": ("fc", ("layer1.2.conv3", "layer3.5.conv3"), 48, 1),
    "mobilenet_v2": ("classifier.1", ("features.5.conv.2", "features.9.conv.2", "features.13.conv.2"), 48, 2),
    "inception_v3": ("fc", ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e"), 107, 0),
}


def build(name: str) -> tuple[Network, torch.Tensor, int]:
    head, taps, size, batchnorms = NETWORKS[name]
    options = {"transform_input": False, "init_weights": False} if name == "inception_v3" else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=5, **options)
    randomise_batchnorm(model)
    return Network(model, head, taps).freeze(), torch.randn(2, 3, size, size), batchnorms


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_maps(name):
    source, images, batchnorms = build(name)
    before = {key: value.clone() for key, value in source.weights().items()}
    frozen = frozen_maps(source)
    with torch.no_grad():
        expected, maps = source(images), frozen(images)
    assert list(maps) == list(source.taps)
    for tap in source.taps:
        torch.testing.assert_close(maps[tap], expected[tap], rtol=1e-4, atol=1e-5 * expected[tap].abs().max().item())
    # Behind a tap BatchNorm stays, where something that is computed needs it; nowhere else.
    assert sum(isinstance(module, nn.BatchNorm2d) for module in frozen.modules()) == batchnorms
    assert all(torch.equal(value, before[key]) for key, value in source.weights().items())
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training


def test_bf16_weights_are_what_autocast_makes_of_them(tiny_source):
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, maps = frozen_maps(tiny_source)(images), frozen_maps(tiny_source, precision="bf16")(images)
    for tap in tiny_source.taps:
        assert maps[tap].dtype == torch.bfloat16 and torch.equal(maps[tap], expected[tap])
    # 8 bits of mantissa: the maps move by less than 1e-3 of what they are (squared, as in the penalty).
    with torch.no_grad():
        exact = tiny_source(images)
    for tap in tiny_source.taps:
        distance = (maps[tap].float() - exact[tap]).square().sum()
        assert distance < 1e-3 * exact[tap].square().sum()


def test_nothing_behind_the_last_tap_is_kept():
    source, _, _ = build("resnet50")
    names = {name for name, _ in frozen_maps(source).named_parameters()}
    assert any(name.startswith("layer3.5.conv3") for name in names)
    assert not any(name.startswith(("layer4", "fc")) for name in names)


def test_logits_where_they_are_wanted(tiny_source):
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected, maps = tiny_source(images), frozen_maps(tiny_source, with_logits=True)(images)
    assert maps.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(maps[name], expected[name], rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_trains_the_networks_own_head(tiny_source):
    network = tiny_source.with_new_head(3, seed=0).freeze()
    head = network.head_parameters()
    for parameter in head.values():
        parameter.requires_grad_(True)
    images = torch.randn(2, 3, 8, 8)
    frozen = frozen_backbone(network)
    torch.testing.assert_close(frozen(images)["logits"], network(images)["logits"], rtol=1e-4, atol=1e-5)
    assert {p for p in frozen.parameters() if p.requires_grad} == set(head.values())
    # No graph through the backbone: the logits are made of features that need no gradient.
    frozen(images)["logits"].sum().backward()
    assert all(p.grad is not None for p in head.values())
    assert all(p.grad is None for p in network.backbone_parameters().values())
