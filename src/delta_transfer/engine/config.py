"""The options of a run: its four choices (dataset, backbone, reg, schedule) and what goes with them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..common.options import MISSING, Options, from_mapping, option
from ..data.options import DatasetConfig, PairsConfig, SplitConfig
from ..data.registry import READERS
from ..methods import method_config
from ..models.sources import SourceConfig
from ..models.zoo import BackboneConfig
from .optimizers import OPTIMIZERS, OptimizerConfig, ScheduleConfig

TASKS = ("classification", "verification")


@dataclass
class ArcFaceConfig(Options):
    """The loss of task=verification, with its published values."""

    key: ClassVar[str] = "arcface"

    scale: float = option(64.0, "factor on the cosines", above=0)
    margin: float = option(0.5, "margin between classes, in radians", at_least=0, below=math.pi)


@dataclass
class RunConfig(Options):
    dataset: DatasetConfig = MISSING
    backbone: BackboneConfig = MISSING
    # A MethodConfig. OmegaConf keeps a sum's terms only in a field of any type.
    reg: Any = option(help="the method and its options")
    schedule: ScheduleConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    split: SplitConfig = field(default_factory=SplitConfig)
    arcface: ArcFaceConfig = field(default_factory=ArcFaceConfig)
    task: str = option("classification", "what the test images measure; the data set brings it", choices=TASKS)
    # Entries of the command line, which cli/ resolves to a list of SourceConfig.
    source: Any = option(None, "networks to learn from, where they are not the one that backbone.weights names")
    seed: int = option(0, "seed of the head, the order of the images, their crops and the method's draws", at_least=0)
    device: str = option("auto", "where the run computes", choices=("auto", "cpu", "cuda"), identity=False)
    precision: str = option(
        "auto",
        "arithmetic of the networks; auto: bf16 on a GPU that has it, else fp32",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = option(False, "compile the networks with torch.compile")
    deterministic: bool = option(False, "use deterministic algorithms only")
    data_dir: str = option("data", "folder that holds the data sets' own folders", identity=False)
    results_dir: str = option("results", "folder for the runs' records", identity=False)
    cache_dir: str = option("results/cache", "folder for image stores and channel attention", identity=False)
    logging: str = option(
        "none", "where metrics are shown beside metrics.jsonl", choices=("none", "tensorboard"), identity=False
    )
    model_card: bool = option(
        False, "describe the trained network, so that source=.../model.safetensors accepts it", identity=False
    )
    dry_run: bool = option(False, "say what is finished, missing and not ready; run nothing", identity=False)
    retry_failed: bool = option(False, "make runs again that failed before", identity=False)

    def check(self) -> None:
        pad, side = self.schedule.pad, self.backbone.image_size
        self.require(
            pad < side, "schedule.pad", f"schedule.pad ({pad}) must be less than backbone.image_size ({side})."
        )
        pairs = isinstance(self.dataset, PairsConfig)
        self.require(
            self.task == ("verification" if pairs else "classification"),
            "task",
            f"task={self.task}: this data set is "
            + ("tested on pairs of images (task=verification)." if pairs else "for task=classification.")
            + ("" if pairs else " There are pairs to verify in dataset=lfw and dataset=glyph_pairs."),
        )
        self.require(
            self.reg.name != "scratch" or self.backbone.weights == "none",
            "reg.name",
            f"reg=scratch begins with random weights, not with {self.backbone.weights}: set backbone.weights=none.",
        )


def run_config_from(values: Mapping[str, Any]) -> RunConfig:
    """The checked configuration that plain data stand for, such as a record's `config`. Raises OptionError."""
    groups: dict[str, type[Options]] = {
        "dataset": READERS[values["dataset"]["reader"]].options,
        "optimizer": OPTIMIZERS[values["optimizer"]["name"]].options,
    }
    made: dict[str, Any] = {name: from_mapping(group, values[name]) for name, group in groups.items()}
    made["reg"] = method_config(values["reg"])
    if values.get("source") is not None:
        made["source"] = [from_mapping(SourceConfig, entry) for entry in values["source"]]
    return from_mapping(RunConfig, {**values, **made})
