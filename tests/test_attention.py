"""Channel attention: the evaluation behind the tap equals the plain full forward with the channel removed."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from scipy.stats import spearmanr
from torch import nn

from delta_transfer.methods import DELTA, attention
from delta_transfer.methods.attention import AttentionConfig, split_half_correlation, taylor_importance, train_probe
from delta_transfer.methods.fast.channel_ablation import Suffixes
from delta_transfer.models import Network

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


def channel_importance(*arguments) -> dict[str, torch.Tensor]:
    """The mean over images, {tap: (C,)}."""
    return {tap: rises.mean(dim=0).float() for tap, rises in attention.channel_importance(*arguments).items()}


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
        ("inception_v3", "fc", ("Conv2d_2b_3x3", "Mixed_6e"), 75),
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


@pytest.mark.parametrize(("head_images", "expected"), [(None, 9), (12, 3), (30, 6), (35, 6), (36, 9), (1000, 9)])
def test_the_images_of_the_probe_are_bounded(head_images, expected, tiny_source):
    """Three epochs of three batches of four images. Each epoch has at least one batch."""
    seen = []

    class Counted(list):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append(batch)
                yield batch

    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    options = AttentionConfig(head_epochs=3, head_images=head_images)
    train_probe(tiny_source, Counted(batches_of(images, labels, 4)), 3, options)
    assert len(seen) == expected
    unsized = (batch for _ in range(4) for batch in batches_of(images, labels, 4))
    if head_images and head_images < 36:  # of an iterator, each epoch takes the next batches
        train_probe(tiny_source, unsized, 3, options)
        assert len(list(unsized)) == 12 - expected
    assert ("head_images" in DELTA(attention=options).fit_options()) == (head_images is not None)


def test_the_last_stage_is_done_at_head_cost_and_the_others_are_not():
    model = torchvision.models.resnet18(num_classes=5)
    suffixes = Suffixes(Network(model, "fc", ("layer1.1.conv2", "layer3.1.conv2", "layer4.1.conv2")).freeze())
    assert [suffix.rest is None for suffix in suffixes.taps.values()] == [False, False, True]
    # The first convolutions behind a tap are not done again for each channel.
    first = {str(node.target) for node in suffixes.taps["layer1.1.conv2"].mixing}
    assert first == {"layer2.0.conv1", "layer2.0.downsample.0"}


@pytest.mark.parametrize(
    ("behind", "rest"),
    [
        # A channel has several features in the head: it takes the long way.
        ([nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 4)], True),
        ([nn.Flatten(), nn.Linear(180, 4)], True),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(5, 4)], False),
        # What mixes first is a convolution of any kind, or one of groups, which does not mix all.
        ([nn.MaxPool2d(2), nn.Conv2d(5, 6, 3, 2, 1), nn.Flatten(), nn.Linear(24, 4)], True),
        ([nn.Conv2d(5, 6, (1, 3), 1, (0, 2), (1, 2)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)], True),
        ([nn.Conv2d(5, 10, 3, groups=5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)], True),
    ],
)
def test_what_lies_behind_a_tap(behind, rest):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), *behind)
    network = Network(model, str(len(model) - 1), ("0",)).freeze()
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    assert (Suffixes(network).taps["0"].rest is not None) == rest
    expected = plain_importance(network, images, labels, "0", range(5))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(channel_importance(network, [(images, labels)], 3, 10)["0"], expected)


def test_constants_behind_a_tap_are_not_images():
    class Scaled(nn.Module):
        """A scale of its own for each channel, as ConvNeXt has."""

        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 5, 3, bias=False), nn.Conv2d(5, 6, 3)
            self.scale = nn.Parameter(torch.rand(6, 1, 1))
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            x = self.conv2(self.conv1(x)).relu_() * self.scale
            return self.fc(nn.functional.adaptive_avg_pool2d(x, output_size=1).flatten(1))

    torch.manual_seed(0)
    network = Network(Scaled(), "fc", ("conv1",)).freeze()
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    expected = plain_importance(network, images, labels, "conv1", range(5))
    for forward_images in (3, 6, 100):
        importance = channel_importance(network, [(images, labels)], 3, forward_images)["conv1"]
        torch.testing.assert_close(importance, expected)


def test_rises_are_those_of_each_image(tiny_source):
    torch.manual_seed(2)
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 2, 1])
    together = attention.channel_importance(tiny_source, [(images, labels)], 3, 100)
    for i in range(3):
        alone = attention.channel_importance(tiny_source, [(images[i : i + 1], labels[i : i + 1])], 1, 100)
        for tap in tiny_source.taps:
            torch.testing.assert_close(together[tap][i], alone[tap][0], rtol=1e-4, atol=1e-6)


def test_taylor_is_the_derivative_of_the_removal(tiny_source):
    """Scaling a channel by 1 - t: the loss rises by t times the estimate, for small t."""
    torch.manual_seed(2)
    network = tiny_source.double()
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    estimate = taylor_importance(network, [(images, labels)], 4)["conv1"].mean(dim=0)
    model, t = network.copy()._model[0].eval(), 1e-5
    with torch.no_grad():
        intact = F.cross_entropy(model(images), labels)
        for channel in range(5):
            weight = model.conv1.weight[channel].clone()
            model.conv1.weight[channel] *= 1 - t
            rise = F.cross_entropy(model(images), labels) - intact
            model.conv1.weight[channel] = weight
            assert estimate[channel].item() == pytest.approx(rise.item() / t, rel=1e-3, abs=1e-8)


def test_split_half_correlation():
    torch.manual_seed(0)
    importance = torch.arange(50.0)
    same = importance + 0.01 * torch.randn(10, 50)
    assert split_half_correlation(same) > 0.99
    assert abs(split_half_correlation(torch.randn(10, 500))) < 0.2
    assert split_half_correlation(torch.randn(1, 50)) is None  # no second half
    assert split_half_correlation(torch.randn(10, 1)) is None  # nothing to rank
    assert split_half_correlation(torch.ones(10, 50)) is None  # no rank
    halves = torch.stack([importance, -importance])
    assert split_half_correlation(halves) == pytest.approx(-1.0)
    ties = torch.randn(7, 60).double().round()
    even, odd = ties[::2].mean(dim=0), ties[1::2].mean(dim=0)
    assert split_half_correlation(ties) == spearmanr(even, odd).statistic  # to the last bit


@pytest.mark.parametrize("method", ["exact", "taylor"])
def test_the_agreement_of_two_halves_is_reported(tiny_source, method):
    torch.manual_seed(2)
    batches = batches_of(torch.randn(8, 3, 8, 8), torch.arange(8) % 3, 4)
    delta = DELTA(attention=AttentionConfig(method=method, images=8, head_epochs=1))
    fitted = delta.fit(tiny_source, batches, 3)
    assert set(fitted) == {"conv1", "conv2", "conv1/split_half", "conv2/split_half"}
    assert set(delta.fit_report) == {"conv1/split_half", "conv2/split_half"}
    assert all(-1 <= value <= 1 for value in delta.fit_report.values())
    assert delta.relative_weights("conv1").shape == (5,)
