"""Silent channels of the source: what activation means, and counts that are exact."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from delta_transfer.common.console import show_messages
from delta_transfer.common.tables import as_markdown
from delta_transfer.inspect.unused_channels import Change, Count, caption, count, figure_of, mean_activations, table_of
from delta_transfer.models import HookedNetwork, Network

# Median 1.0, so at 10 % the limit is 0.1: channels 0, 1 and 2 are silent in the source.
SOURCE = np.array([0.0, 0.05, 0.0999, 0.1, 1.0, 2.0, 3.0, 4.0, 5.0])
#                 woken  -    woken   fallen              fallen
TARGET = np.array([0.1, 0.09, 7.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0999])


def change(method: str, target: np.ndarray) -> Change:
    return Change(f"{method}, seed 0", method, method, {"a": SOURCE, "b": SOURCE}, {"a": target, "b": SOURCE})


def test_counts_are_exact():
    assert count(SOURCE, TARGET, 0.1) == Count(channels=9, silent=3, woken=2, fallen=2)
    assert count(SOURCE, SOURCE, 0.1) == Count(9, 3, 0, 0)
    assert count(SOURCE, TARGET, 0.06) == Count(9, 2, 2, 1)  # the limit is 0.06
    # The limit is the source's own, whatever becomes of the target's scale.
    assert count(SOURCE, 100 * SOURCE, 0.1) == Count(9, 3, 2, 0)


def test_table_has_a_row_for_each_tap_and_one_for_all(capsys):
    table = table_of([change("l2", TARGET), change("l2_fe", SOURCE)], 0.1, 512)
    rows = [[entry.text for entry in row] for row in table.rows]
    assert rows == [
        ["l2, seed 0", "a", "9", "3", "2", "2"],
        ["l2, seed 0", "b", "9", "3", "0", "0"],
        ["l2, seed 0", "all taps", "18", "6", "2", "2"],
        ["l2_fe, seed 0", "a", "9", "3", "0", "0"],
        ["l2_fe, seed 0", "b", "9", "3", "0", "0"],
        ["l2_fe, seed 0", "all taps", "18", "6", "0", "0"],
    ]
    text = as_markdown([table])
    assert "below 10 % of" in text and "512 test images" in text
    assert capsys.readouterr().out == ""


def test_a_tap_that_is_mostly_zero_is_named(capsys):
    zeros = {"a": np.array([0.0, 0.0, 1.0])}
    show_messages()
    table = table_of([Change("L2", "l2", "L2", zeros, zeros)], 0.1, 5)
    assert [entry.text for entry in table.rows[0]] == ["L2", "a", "3", "0", "0", "0"]
    (message,) = capsys.readouterr().out.splitlines()
    assert message.startswith("a: ")


def test_activation_is_what_batchnorm_and_relu_make_of_the_map(tiny_source):
    images = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    batches = [images[:2], images[2:]]  # of unequal size: the mean is over images, not over batches
    found = mean_activations(tiny_source, batches)
    layers = tiny_source.traced
    with torch.no_grad():
        maps = tiny_source(images)
        expected = {
            "conv1": F.relu(layers.bn1(maps["conv1"])).mean(dim=(0, 2, 3)),
            "conv2": F.relu(layers.bn2(maps["conv2"])).mean(dim=(0, 2, 3)),
        }
    assert set(found) == {"conv1", "conv2"}
    for tap, values in expected.items():
        np.testing.assert_allclose(found[tap], values.numpy(), rtol=1e-5)


def test_activation_is_the_absolute_map_where_batchnorm_does_not_read_it_alone():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
            self.bn, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.conv1(x)
            y = self.conv2(F.relu(x))
            return self.fc((self.bn(y) + y + x).mean(dim=(2, 3)))  # BatchNorm reads conv2, but so does the sum

    images, taps = torch.randn(3, 3, 8, 8), ("conv1", "conv2")
    for kind in (Network, HookedNetwork):  # the second one has no graph
        network = kind(Block(), "fc", taps).freeze()
        found = mean_activations(network, [images])
        for tap in taps:
            expected = network(images)[tap].abs().mean(dim=(0, 2, 3))
            np.testing.assert_allclose(found[tap], expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("taps", [1, 3])
def test_figure_has_a_panel_for_each_tap_and_every_channel_in_it(taps):
    names = [f"tap{i}" for i in range(taps)]
    changes = [
        Change(f"{m}, seed {s}", m, m.upper(), dict.fromkeys(names, SOURCE), dict.fromkeys(names, TARGET))
        for m in ("l2", "delta")
        for s in (0, 1)
    ]
    figure = figure_of(changes, 0.1)
    assert [panel.get_title() for panel in figure.axes] == names
    for panel in figure.axes:
        assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
        assert [len(marks.get_offsets()) for marks in panel.collections] == [len(SOURCE)] * 4
        assert all((marks.get_offsets() > 0).all() for marks in panel.collections)  # zeros are at the edge
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["L2", "DELTA"]
    assert "l2, seed 0, l2, seed 1, delta, seed 0" in caption(changes, 0.1, 512)
