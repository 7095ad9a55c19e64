"""Published numbers beside ours: reads published.csv and names the settings in which our runs differ.

published.csv holds only what could be verified: in a paper, a table made from it, or its authors' README (`source`).
A mean without a std was published without one.
"""

import csv
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from ..records.reading import Record, section
from .comparison import Cell, Comparison, Row
from .record_views import facts

IMAGE_SIZES = {"inception_v3": 299, "vgg9_bn": 32}  # else 224


@dataclass(frozen=True)
class Protocol:
    """How a table's numbers were made, as far as known."""

    title: str
    settings: dict[str, object]  # facts of a record, as in `facts_of`
    remark: str = ""  # for facts that no setting of ours expresses
    of_methods: dict[str, dict[str, object]] = field(default_factory=dict)  # known settings of single methods
    of_transfer: bool = False  # numbers of targets from random weights, which do not compare with fine-tuned ones


DELTA = {"weights": "ImageNet", "iterations": 9000, "batch_size": 64, "lr": 0.01, "train_crop": "random"}
TLL = {"weights": "ImageNet", "iterations": 10000, "batch_size": 48, "train_crop": "random_resized"}
BEST_ON_TEST = "the best epoch on the test part, one seed"

GTOT: dict[str, object] = {"batch_size": 32}
GTOT_REMARK = (
    "mean ROC-AUC of the GIN of Hu et al. over 10 run seeds, of the epoch that is best on validation molecules; Adam "
    "with ReduceLROnPlateau; settings of the baselines are not published; DELTA without the factor C"
)

PROTOCOLS = {
    "paper": Protocol(
        "DELTA (ICLR 2019), main table",
        DELTA,
        "settings of the official code, whose published script has 6,000 iterations",
    ),
    "afa": Protocol(
        "AFA (2021), its authors' README",
        {"weights": "ImageNet", "batch_size": 64, "train_crop": "random"},
        "the best epoch on the test part; AFA in two stages of 4,500 iterations at learning rates 0.01 and 0.001",
        {"afa": {"iterations": 9000, "lr": 0.01}},
    ),
    "l2t_ww": Protocol(
        "L2T-ww (ICML 2019)",
        {"weights": "none"},
        "a target from random weights; its source is ResNet-34 trained on ImageNet for ResNet-18, ResNet-32 trained on "
        "Tiny-ImageNet for VGG-9; the epoch that is best on validation images",
        of_transfer=True,
    ),
    "tll": Protocol("Transfer-Learning-Library, parts of the training images", TLL, BEST_ON_TEST),
    "tll_ten": Protocol("Transfer-Learning-Library, ten data sets", TLL, BEST_ON_TEST),
    "tll_moco": Protocol(
        "Transfer-Learning-Library, MoCo-v1 weights",
        TLL | {"weights": "MoCo-v1", "iterations": 24000},
        f"{BEST_ON_TEST}; DELTA's channels were probed on the supervised network",
    ),
    "paddle": Protocol(
        "PaddleTransfer",
        {"weights": "ImageNet", "batch_size": 64, "lr": 0.01},
        "penalties of other forms than the papers'",
    ),
    "gtot_contextpred": Protocol("GTOT-Tuning (IJCAI 2022), contextpred", GTOT, GTOT_REMARK),
    "gtot_supervised": Protocol("GTOT-Tuning (IJCAI 2022), supervised_contextpred", GTOT, GTOT_REMARK),
}


@dataclass(frozen=True)
class Published:
    dataset: str
    backbone: str
    method: str  # its name in the configuration; plain fine-tuning is l2
    protocol: str
    classes: int | None
    n_train: int | None
    n_test: int | None
    mean: float  # percent: top-1 accuracy, or ROC-AUC for data sets with that metric
    std: float | None
    source: str

    def __str__(self) -> str:
        mean = f"{self.mean:.1f}" if round(self.mean, 1) == self.mean else f"{self.mean:.2f}"  # as published
        return mean if self.std is None else f"{mean} ± {self.std:.1f}"


@cache
def published() -> tuple[Published, ...]:
    """All numbers of published.csv."""
    text = (files(__package__) / "published.csv").read_text(encoding="utf-8")
    numbers = {"classes": int, "n_train": int, "n_test": int, "mean": float, "std": float}

    def typed(row: dict[str, Any]) -> Published:
        return Published(**row | {key: kind(row[key]) if row[key] else None for key, kind in numbers.items()})

    return tuple(map(typed, csv.DictReader(text.splitlines())))


@dataclass(frozen=True)
class Match:
    """One cell of ours beside the published number of the same data set and method, if there is one."""

    row: Row
    method: str
    cell: Cell
    number: Published | None
    differing: list[str]  # "iterations 300 (9000)": ours, and the published one in brackets

    @property
    def difference(self) -> float | None:
        """Ours minus the published number; None without one, and for another backbone's."""
        same = self.number is not None and self.number.backbone == target_of(self.row)
        return self.cell.mean - self.number.mean if self.number and same else None


def against(comparison: Comparison, protocol: str) -> list[Match]:
    """Every cell of `comparison` beside its published number, chosen as in `find`."""
    made = []
    for method, row, cell in comparison.results:
        ours = facts_of(cell.runs[0])
        number = find(protocol, row.dataset, target_of(row), method, ours["n_train"])
        made.append(Match(row, method, cell, number, differing(ours, number) if number else []))
    return made


def target_of(row: Row) -> str:
    """The network that was trained; a row may name its sources, too."""
    return str(section(next(iter(row.cells.values())).runs[0], "backbone")["name"])


def find(protocol: str, dataset: str, backbone: str, method: str, n_train: object) -> Published | None:
    """The published number with the nearest number of training images (None: with the most).

    Where a protocol has one backbone for a data set, and another than ours, the number is that backbone's.
    """
    known = backbones(protocol, dataset)
    key = (protocol, dataset, known[0] if len(known) == 1 else backbone, method)
    found = [one for one in published() if (one.protocol, one.dataset, one.backbone, one.method) == key]
    if not isinstance(n_train, int):
        return max(found, key=lambda one: one.n_train or 0, default=None)
    return min(found, key=lambda one: abs((one.n_train or n_train) - n_train), default=None)


def backbones(protocol: str, dataset: str) -> list[str]:
    """The backbones with which a data set was published in a protocol."""
    of_dataset = [one.backbone for one in published() if (one.protocol, one.dataset) == (protocol, dataset)]
    return list(dict.fromkeys(of_dataset))


def facts_of(record: Record) -> dict[str, object]:
    """The settings of a run that can be compared with a published protocol."""
    known = facts(record)
    return {
        "backbone": section(record, "backbone").get("name"),
        "weights": section(record, "backbone").get("weights"),
        **{key: known[key] for key in ("image_size", "iterations", "batch_size", "lr")},
        "train_crop": section(record, "schedule").get("train_crop"),
        "classes": record.get("num_classes"),
        "n_train": known["n_train"],
        "n_test": record.get("n_test"),
    }


def differing(facts: dict[str, object], number: Published) -> list[str]:
    """The settings in which a run differs from the published one, as far as both are known."""
    protocol = PROTOCOLS[number.protocol]
    theirs = protocol.settings | protocol.of_methods.get(number.method, {})
    theirs |= {key: getattr(number, key) for key in ("backbone", "classes", "n_train", "n_test")}
    theirs["image_size"] = IMAGE_SIZES.get(number.backbone, 224)
    known = {key: value for key, value in theirs.items() if value is not None}
    # "ImageNet" means torchvision's first weights; later recipes give other networks.
    wanted = known | {"weights": "IMAGENET1K_V1"} if known.get("weights") == "ImageNet" else known
    return [
        f"{key} {ours} ({known[key]})"
        for key, ours in facts.items()
        if ours is not None and key in known and ours != wanted[key]
    ]


def what_is_known(comparison: Comparison, protocol: str) -> list[str]:
    """A line for each data set and backbone of ours without numbers in `protocol`, with the published backbones."""
    lines = []
    for dataset, backbone in dict.fromkeys((row.dataset, target_of(row)) for row in comparison.rows):
        others = backbones(protocol, dataset)
        if backbone not in others and len(others) != 1:
            known = f"only with {', '.join(others)}" if others else "not with any backbone"
            lines.append(f"{dataset} was not published with {backbone}, {known}")
    return lines
