"""How large a comparison of methods can be in a given time: levels from cheapest to dearest, and the time of each.

cli/which_is_best.py makes the comparison. A level's time is counts times measured times, as in a dry run.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..common.console import duration
from ..common.errors import UserError
from ..common.options import require
from ..data.dataset import Dataset
from ..engine.config import RunConfig
from ..engine.optimizers import automatic_length
from ..engine.tasks import TASKS
from ..methods import METHODS
from ..models.zoo import build_source
from ..records.files import make_output_folder, write_atomically
from .costs import seconds_of_decoding
from .planning import Job, Plan

FREE = 0.1  # fraction of the time that is left unplanned: other programs on the machine come and go
BATCH = 32  # images per step where a level bounds the iterations
BASELINES = ("l2", "l2_fe")  # in the final runs beside the chosen method; L2-FE costs a third
Place = tuple[str, str]  # backbone and method, as they are written on the command line


@dataclass(frozen=True)
class Level:
    """What is compared, and how thoroughly. None: the rest of the command decides."""

    image_size: int | None
    iterations: int | None  # at most; a small data set gets fewer, 30 passes over its images
    folds: int
    seeds: int
    methods: tuple[str, ...]
    backbones: tuple[str, ...]
    own_length: bool = False  # the command names the iterations or passes, and not the images of a step

    def __str__(self) -> str:
        return ", ".join(value for value in words_of(self).values() if value)


THREE = (*BASELINES, "delta_noatt")
FIVE = ("l2", "l2_fe", "l2_sp", "delta_noatt", "delta")
SMALL, BOTH = ("resnet18",), ("resnet18", "resnet50")
LEVELS = (
    Level(96, 100, 2, 1, BASELINES, SMALL),
    Level(128, 100, 2, 3, BASELINES, SMALL),
    Level(128, 100, 2, 3, THREE, SMALL),
    Level(128, 200, 3, 3, THREE, SMALL),
    Level(128, 200, 3, 3, FIVE, SMALL),
    Level(160, 300, 3, 3, FIVE, SMALL),
    Level(None, 300, 3, 3, FIVE, SMALL),
    Level(None, None, 3, 3, FIVE, SMALL),
    Level(None, None, 3, 3, FIVE, BOTH),
    Level(None, None, 5, 5, FIVE, BOTH),
)
PRESETS = {"quick": 3, "good": 6, "best": len(LEVELS) - 1}


def words_of(level: Level) -> dict[str, str]:
    """Each part of a level in words; "" for what it leaves to the rest of the command."""

    def count(number: int, what: str) -> str:
        return f"{number} {what}{'s' * (number != 1)}"

    return {
        "backbones": " and ".join(level.backbones),
        "image_size": f"images of {level.image_size} pixels" if level.image_size else "",
        "iterations": f"at most {level.iterations} iterations" if level.iterations else "",
        "folds": count(level.folds, "fold"),
        "seeds": count(level.seeds, "seed"),
        "methods": f"methods {', '.join(METHODS[method].title for method in level.methods)}",
    }


def gains(level: Level, dearer: Level) -> str:
    """What a dearer level adds, in words."""
    whole = {"image_size": "the network's own image size", "iterations": "iterations for the number of images"}
    ours, theirs = words_of(level), words_of(dearer)
    return ", ".join(theirs[part] or whole[part] for part in ours if theirs[part] != ours[part])


def levels_with(fixed: Mapping[str, Any], levels: Iterable[Level] = LEVELS) -> list[Level]:
    """The levels with the values that the command sets itself, each once."""
    return list(dict.fromkeys(replace(level, **fixed) for level in levels))


def seconds_in(text: str) -> float:
    """The seconds of a budget such as 45m, 2h or 1h30m. Raises UserError for anything else."""
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?", text)
    counts = [int(count or 0) for count in found.groups()] if found else [0, 0, 0, 0]
    seconds = sum(count * unit for count, unit in zip(counts, (86400, 3600, 60, 1), strict=True))
    require(0 < seconds < 10**8, f"budget={text} is not a time: write days, hours, minutes, seconds as in 1d2h30m15s.")
    return seconds


# --- What a level sets, and takes ---


def settings(level: Level, config: RunConfig, images: int) -> dict[str, Any]:
    """The keys that a level sets for a run `config` on `images` training images, held-out ones included.

    A network that takes only its own image size keeps it.
    """
    made: dict[str, Any] = {}
    own, size = config.backbone, level.image_size
    if size and size < own.image_size and takes_images_of(config, size):
        made["backbone.image_size"], made["backbone.resize"] = size, round(size * own.resize / own.image_size)
    iterations, batch_size = automatic_length(images, BATCH)
    if level.iterations:
        made["schedule.iterations"] = min(iterations, level.iterations)
    if level.iterations or level.own_length:
        made["schedule.batch_size"] = batch_size
    return made


def takes_images_of(config: RunConfig, size: int) -> bool:
    try:
        smaller = config.backbone.replace(weights="none", image_size=size, resize=size)
        build_source(smaller, 0, tapped=True).map_shapes(2, size, training=False)
    except UserError:
        return False
    return True


def with_settings(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A copy of the configuration with other values of dotted keys."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    return config.replace(**{group: getattr(config, group).replace(**names) for group, names in groups.items()})


@dataclass(frozen=True)
class Estimate:
    """Seconds of a comparison, one run after the other."""

    before: float  # to decode images
    on_folds: float
    final: dict[str, dict[str, float]]  # by backbone and method

    @property
    def total(self) -> float:
        """Seconds with the final runs of the dearest choice."""
        return self.of(*max(self.choices(), key=lambda choice: self.of(*choice)))

    def choices(self) -> list[Place]:
        return [(backbone, method) for backbone, found in self.final.items() for method in found]

    def of(self, backbone: str, method: str) -> float:
        """Seconds with the final runs of this choice."""
        final = self.final[backbone]
        return (
            self.before + self.on_folds + sum(final[one] for one in dict.fromkeys([*BASELINES, method]) if one in final)
        )


def estimate(
    level: Level,
    dataset: Dataset,
    configs: Mapping[Place, RunConfig],
    strengths: Mapping[str, int],
    beside_steps: Mapping[str, float],
    plan: Plan,
) -> Estimate:
    """The time of a level.

    configs: a final run of each backbone and method. strengths: the number of alphas that a method is tried with, if
    more than one. beside_steps: seconds of a run outside of its steps, by backbone. plan: measures each thing once.
    """
    on_folds, stores = 0.0, dict[tuple[int, str], float]()
    final: dict[str, dict[str, float]] = {backbone: {} for backbone in level.backbones}
    jobs = {}
    for place, config in configs.items():
        split = config.split.replace(folds=level.folds, fold=0)
        jobs[place] = [planned(plan, config.replace(split=one)) for one in (split, config.split)]
    now = plan.waiting  # elapsed seconds per processor second
    for (backbone, method), config in configs.items():
        (fold, whole), beside = jobs[backbone, method], beside_steps[backbone]
        runs = level.folds * strengths.get(method, 1)
        fit_fold, fit_whole = (now * job.cost.seconds_to_fit(job.n_train) for job in (fold, whole))
        on_folds += runs * (now * fold.seconds + beside) + level.folds * fit_fold
        final[backbone][method] = level.seeds * (now * whole.seconds + beside) + fit_whole
        size, aspect = config.backbone.resize, config.schedule.aspect
        if (size, aspect) not in stores and TASKS[config.task].stores_to_build(config, dataset):
            stores[size, aspect] = len(dataset.labels) * seconds_of_decoding(dataset, size, aspect)
    return Estimate(sum(stores.values()), on_folds, final)


def planned(plan: Plan, config: RunConfig) -> Job:
    plan.add(config.replace())  # it sets the precision
    return plan.jobs[-1]


# --- The choice of a level, and its file ---


@dataclass(frozen=True)
class Chosen:
    level: Level
    estimate: Estimate
    images: int  # for training
    more: str  # what more time would buy


def dearest_within(
    levels: list[Level], seconds_left: Callable[[], float], estimate_of: Callable[[Level], Estimate]
) -> tuple[Level, Estimate, str]:
    """The dearest level that fits into the time left, its estimate, and what more time would buy.

    Levels beyond the first one that does not fit are not measured.

    Raises UserError if even the cheapest one does not fit.
    """
    best: tuple[Level, Estimate] | None = None
    for level in levels:
        found = estimate_of(level)
        needed = found.total / (1 - FREE)
        if needed > seconds_left():
            require(
                best is not None,
                f"The smallest comparison ({level}) takes about {duration(needed)}: set budget={as_budget(needed)}, or "
                "take fewer steps, such as schedule.iterations=50.",
            )
            assert best is not None
            return *best, f"{duration(needed)} (budget={as_budget(needed)}) would also buy: {gains(best[0], level)}."
        best = level, found
    assert best is not None, "there are levels"
    return *best, "More time would buy nothing: this is the largest comparison."


def as_budget(seconds: float) -> str:
    """A little more than `seconds`, as a value of budget=."""
    return f"{int(1.1 * seconds / 60) + 1}m"


def plan_path(results_dir: str, words: Iterable[str]) -> Path:
    """Where the plan of a command is kept. A dry run has the same place."""
    kept = sorted(word for word in words if not word.startswith(("dry_run=", "retry_failed=", "prefer=")))
    return Path(results_dir) / f"which_is_best-{sha256(json.dumps(kept).encode()).hexdigest()[:8]}.json"


def write_plan(path: Path, chosen: Chosen) -> None:
    make_output_folder(path.parent)
    write_atomically(path, json.dumps(asdict(chosen), indent=1).encode())


def read_plan(path: Path) -> Chosen | None:
    """The plan of an earlier start of the command; None if there is none. Raises UserError for a damaged file."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        level: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values["level"].items()}
        return Chosen(Level(**level), Estimate(**values["estimate"]), values["images"], values["more"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a plan of this program: delete it, and the command plans anew.") from None
