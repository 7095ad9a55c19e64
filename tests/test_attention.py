"""Channel attention: the evaluation behind the tap equals the plain full forward with the channel removed."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

from delta_transfer.config import AttentionConfig
from delta_transfer.models import Network
from delta_transfer.regularizers.attention import channel_importance, train_probe

from .conftest import randomise_batchnorm


@torch.no_grad()
def plain_importance(network: Network, images, labels, tap: str, channels) -> torch.Tensor:
    """Channel by channel, a full forward of the original model with the channel of the tapped output set to 0."""
    model = network.copy()._model[0].eval()
    intact = F.cross_entropy(model(images).double(), labels)
    rises = []
    for channel in channels:

        def remove(module, args, output, channel=channel):
            output = output.clone()
            output[:, channel] = 0
            return output

        handle = model.get_submodule(tap).register_forward_hook(remove)
        rises.append(F.cross_entropy(model(images).double(), labels) - intact)
        handle.remove()
    return torch.stack(rises).float()


def batches_of(images, labels, size):
    return list(zip(images.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("forward_images", [1, 5, 1000])
def test_equals_full_forwards_on_a_residual_network(tiny_source, forward_images):
    torch.manual_seed(2)
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))
    importance = channel_importance(tiny_source, batches_of(images, labels, 4), 6, forward_images)
    for tap in tiny_source.taps:
        expected = plain_importance(tiny_source, images, labels, tap, range(5))
        assert expected.abs().max() > 1e-3  # removing something has an effect at all
        torch.testing.assert_close(importance[tap], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "head", "taps", "size"),
    [
        ("resnet18", "fc", ("layer1.1.conv2", "layer3.1.conv2", "layer4.1.conv2"), 33),
        ("mobilenet_v2", "classifier.1", ("features.5.conv.2", "features.17.conv.2"), 33),
        ("inception_v3", "fc", ("Conv2d_2b_3x3", "Mixed_5d", "Mixed_6e"), 80),
    ],
)
def test_equals_full_forwards_on_torchvision_networks(name, head, taps, size):
    """All channels by the fast way, a few of them checked; small random weights, so that float noise is small too."""
    torch.manual_seed(3)
    options = {"aux_logits": True, "transform_input": False, "init_weights": False} if name == "inception_v3" else {}
    model = torchvision.models.get_model(name, num_classes=5, **options)
    randomise_batchnorm(model)
    network = Network(model, head, taps).freeze()
    images, labels = torch.randn(2, 3, size, size), torch.tensor([1, 3])
    importance = channel_importance(network, [(images, labels)], 2, 64)
    for tap in taps:
        channels = [0, 7, len(importance[tap]) - 1]
        expected = plain_importance(network, images, labels, tap, channels)
        torch.testing.assert_close(importance[tap][channels], expected, rtol=1e-3, atol=2e-5)
    assert any(v.abs().max() > 1e-4 for v in importance.values())


def test_zero_filter_equals_zero_channel(tiny_source):
    """At a convolution without bias, removal at the map is the published removal of the filter."""
    torch.manual_seed(2)
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))
    importance = channel_importance(tiny_source, [(images, labels)], 6, 100)
    model = tiny_source.copy()._model[0].eval()
    with torch.no_grad():
        intact = F.cross_entropy(model(images), labels)
        model.conv2.weight[3] = 0
        rise = F.cross_entropy(model(images), labels) - intact
    assert importance["conv2"][3].item() == pytest.approx(rise.item(), abs=1e-6)


def test_takes_exactly_the_images_asked_for(tiny_source):
    torch.manual_seed(2)
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))
    some = channel_importance(tiny_source, batches_of(images, labels, 4), 5, 100)
    torch.testing.assert_close(some, channel_importance(tiny_source, [(images[:5], labels[:5])], 5, 100))
    # More than one pass: the six images, then the first three again.
    twice = channel_importance(tiny_source, batches_of(images, labels, 6), 9, 100)
    again = torch.cat([images, images[:3]]), torch.cat([labels, labels[:3]])
    torch.testing.assert_close(twice, channel_importance(tiny_source, [again], 9, 100))


def test_probe_trains_the_head_only(tiny_source):
    torch.manual_seed(4)
    labels = torch.arange(12) % 3
    images = torch.randn(12, 3, 8, 8) + labels.view(-1, 1, 1, 1)  # brighter classes: something to learn
    before = {name: value.clone() for name, value in tiny_source.weights().items()}
    options = AttentionConfig(head_epochs=20, head_lr=0.5)
    probe = train_probe(tiny_source, batches_of(images, labels, 4), 3, options)
    after = probe.weights()
    for name, value in before.items():
        if not probe.is_head(name):
            assert torch.equal(value, after[name]), name  # BatchNorm statistics included
        assert torch.equal(value, tiny_source.weights()[name])  # the source itself is not touched
    untrained = tiny_source.with_new_head(3, options.seed).freeze()
    with torch.no_grad():
        loss_of = lambda network: F.cross_entropy(network(images)["logits"], labels).item()  # noqa: E731
        assert loss_of(probe) < loss_of(untrained) - 0.05
