import gc
from itertools import zip_longest

import pytest
import torch
from torch import nn

from delta_transfer.common import cores, timing
from delta_transfer.common.console import log_once, show_messages
from delta_transfer.models import Network

from .miniature import CONF, GROUPS, composed, names
from .quick_hydra import compose_each_choice_once, skip_second_compositions

gc.set_threshold(50_000, 20, 100)  # by default a third of the time in which Hydra composes is garbage collection


@pytest.fixture(autouse=True)
def messages():
    """Shows messages as delta-run does, whatever a command of the test before made of them."""
    show_messages()
    log_once.cache_clear()


@pytest.fixture(autouse=True)
def nothing_else_runs(monkeypatch):
    """Keeps messages about a busy machine out of the output of commands."""
    monkeypatch.setattr(cores, "others", 0.0)


@pytest.fixture(autouse=True, scope="session")
def hydra_is_quick():
    with pytest.MonkeyPatch.context() as patch:
        compose_each_choice_once(patch)
        skip_second_compositions(patch)
        yield


@pytest.fixture(autouse=True, scope="session")
def measurements_are_short():
    """Shortens measurements from half a second to 10 ms, since no test looks at times."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (timing.seconds_of, timing.seconds_in_turn):
            patch.setattr(function, "__defaults__", (0.01,))
        yield


# What a choice does not go without.
NEEDS = {f"backbone={library}": ["backbone.name=resnet18"] for library in ("timm", "torchvision")}
NEEDS |= {"reg=scratch": ["backbone.weights=none"], "reg=sum": ["+reg@reg.terms.at=at"]}


@pytest.fixture(scope="session")
def every_choice() -> dict[str, dict[str, object]]:
    """The options of every choice of every group, by group and name. One composition tries a choice of each group."""
    found = {group: {} for group in GROUPS}
    every = {group: [f"{group}={name}" for name in names(group)] for group in GROUPS}
    files = {one: (CONF / f"{one.replace('=', '/')}.yaml").read_text() for of in every.values() for one in of}
    graphs = [one for one, text in files.items() if "@_global_: graph_" in text or "_: graph_network" in text]
    of_images = zip_longest(*([one for one in of if one not in graphs] for of in every.values()))
    of_graphs = zip_longest(*([one for one in graphs if one.startswith(group)] for group in ("dataset", "backbone")))
    for combined in (*of_images, *of_graphs):
        choices = [choice for choice in combined if choice]
        needed = [word for choice in choices for word in NEEDS.get(choice, [])]
        config = composed(*choices, *needed)
        for group, name in (choice.split("=") for choice in choices):
            found[group][name] = getattr(config, group)
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write tests/golden/ anew from what the code gives now")


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm, a residual sum in place and an in-place ReLU, as in the real networks."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(5, num_classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        return self.fc(self.relu(y).mean(dim=(2, 3)))


def randomise_batchnorm(model: nn.Module) -> None:
    """Statistics, scales and shifts as a trained network has them: far from 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)


@pytest.fixture
def tiny_source() -> Network:
    torch.manual_seed(0)
    model = TinyNet()
    randomise_batchnorm(model)
    return Network(model, head="fc", taps=("conv1", "conv2")).freeze()
