"""What +experiment=which_is_best compares: the words of a command become a grid of runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from hydra.core.override_parser.overrides_parser import OverridesParser

from ..common.options import require
from ..data import Dataset
from ..engine.config import RunConfig
from ..engine.tasks import TASKS
from ..experiment import budget
from ..experiment.choosing import folds_of, training_images
from ..records.reading import Record, section
from ..reporting.rivals import RULES
from .explain import OF_WHICH_IS_BEST
from .sweep import values_of

ALPHAS = {  # by the network's inputs
    # From the published values, for thousands of images, down to the best ones for hundreds in results/published.
    "images": {
        "l2_sp": ["0.01", "0.1"],
        "delta_noatt": ["0.0001", "0.001", "0.01"],
        "delta": ["0.0001", "0.001", "0.01"],
    },
    # Those that scripts/graphs_table.py tries first. DELTA's penalty is a sum over all nodes of a batch.
    "graphs": {
        "l2_sp": ["0.0001", "0.001", "0.01"],
        "delta_noatt": ["1e-11", "1e-10", "1e-9"],
        "delta": ["1e-11", "1e-10", "1e-9"],
        "bss": ["0.0001", "0.001", "0.01"],
    },
}
COMPARED = ("reg", "reg.alpha", "backbone", "seed", "split.folds")

Asked = dict[str, list[str]]
Compose = Callable[[list[str]], tuple[RunConfig, dict[str, str]]]


@dataclass(frozen=True)
class Grid:
    """What is compared, and the words of its runs."""

    rest: list[str]  # of all runs
    backbones: dict[str, list[str]]  # words, by name
    methods: dict[str, list[str]]  # words, by name; L2, the baseline, is the first
    alphas: dict[str, list[str]]  # of the methods that are tried with several
    folds: int | None  # None: the data set has a validation split of its own
    seeds: list[str]
    configs: dict[budget.Place, RunConfig]  # of a run of each backbone and method
    images: dict[str, int]  # for training, by class
    prefer: str  # which of the equally good choices is taken
    select: str  # the measure on held-out and on test images

    @property
    def inputs(self) -> str:
        return next(iter(self.configs.values())).backbone.inputs

    @property
    def of_each(self) -> tuple[int, str]:
        """The number of runs that choose, of each candidate, and what they differ in."""
        return (self.folds, "folds") if self.folds else (len(set(self.seeds)), "seeds")

    def words(self, backbone: str, method: str) -> list[str]:
        return [*self.rest, *self.backbones[backbone], f"reg={method}", *self.methods[method]]

    def first(self, backbone: str, method: str) -> list[str]:
        """The runs that choose. Without folds they are final runs with every alpha."""
        strength = [f"reg.alpha={','.join(self.alphas[method])}"] if method in self.alphas else []
        if not self.folds:
            return [*self.final(backbone, method), *strength]
        held_out = [f"split.folds={self.folds}", f"split.fold={','.join(map(str, range(self.folds)))}"]
        return [*self.words(backbone, method), *strength, f"seed={self.seeds[0]}", *held_out]

    def final(self, backbone: str, method: str, alpha: float | None = None) -> list[str]:
        strength = [f"reg.alpha={alpha}"] if method in self.alphas and alpha is not None else []
        return [*self.words(backbone, method), *strength, "split.folds=null", f"seed={','.join(self.seeds)}"]

    def in_final(self, method: str) -> list[str]:
        """The methods of the final runs if `method` was chosen."""
        return list(dict.fromkeys([*(one for one in budget.BASELINES if one in self.methods), method]))

    def backbone_of(self, record: Record) -> str:
        name = section(record, "backbone")["name"]
        return next(one for one in self.backbones if self.configs[one, "l2"].backbone.name == name)

    def planned(self, plan: budget.Chosen) -> "Grid":
        """The part that a plan keeps, with the plan's settings. Seeds that the command names stay as they are."""
        level, configs = plan.level, self.configs
        set_by_level = {one: budget.settings(level, configs[one, "l2"], plan.images) for one in level.backbones}
        return replace(
            self,
            backbones={
                one: [*self.backbones[one], *(f"{key}={value}" for key, value in values.items())]
                for one, values in set_by_level.items()
            },
            methods={one: words for one, words in self.methods.items() if one in level.methods},
            folds=level.folds,
            seeds=self.seeds if len(self.seeds) == level.seeds else [str(seed) for seed in range(level.seeds)],
        )


def grid_of(
    asked: Asked, of_methods: list[tuple[str, str]], rest: list[str], compose: Compose, datasets: dict[str, Dataset]
) -> Grid:
    """Composes every backbone and method with its words, so that misspelt words are found now.

    datasets: those that the command has read.
    """
    *first, _ = words_of_l2 = first_words(asked, rest)
    config, usual = compose(words_of_l2)
    own_validation, measures = config.dataset.own_validation, TASKS[config.task].measures
    require(
        not own_validation or "split.folds" not in asked,
        f"{config.dataset.name} has a validation split of its own, which chooses: leave out split.folds.",
    )
    require(
        bool(measures),
        f"task={config.task} measures nothing on both validation and test data, so that +experiment=which_is_best "
        "cannot choose: run the methods (delta-run -m reg=l2,delta), and compare them with delta-report.",
    )
    asked = asked_and_rest([f"{key}={values}" for key, values in usual.items()])[0] | asked
    prefer, select = (one_of(key, asked, known) for key, known in (("prefer", RULES), ("select", measures)))
    methods = ["l2", *(method for method in asked["reg"] if method != "l2")]  # the baseline is always there
    options = {method: compose([*first, f"reg={method}"])[0].reg for method in methods}
    own = {method: [w for key, w in of_methods if has(options[method], key)] for method in methods}
    usual_alphas = ALPHAS[config.backbone.inputs]
    alphas = {method: usual_alphas[method] for method in methods if method in usual_alphas}
    if "reg.alpha" in asked:
        of_methods = [*of_methods, ("reg.alpha", f"reg.alpha={','.join(asked['reg.alpha'])}")]
        alphas = dict.fromkeys([m for m in methods if has(options[m], "reg.alpha")], asked["reg.alpha"])
    for key, word in of_methods:
        require(any(has(reg, key) for reg in options.values()), f"{word}: none of {', '.join(methods)} has it.")
    for method in methods:
        for strength in [[f"reg.alpha={alpha}"] for alpha in alphas.get(method, [])] or [[]]:
            options[method] = compose([*first, f"reg={method}", *own[method], *strength])[0].reg
    backbones = {name: [f"backbone={name}"] for name in asked.get("backbone", [])} or {config.backbone.name: []}
    networks = {name: compose([*rest, *words, "reg=l2"])[0] if words else config for name, words in backbones.items()}
    require(
        len({network.backbone.name for network in networks.values()}) == len(networks),
        f"backbone={','.join(backbones)}: two of them are the same network.",
    )
    configs = {(one, method): networks[one].replace(reg=options[method]) for one in networks for method in methods}
    images = {} if own_validation else training_images(config, datasets)
    most = None if own_validation else folds_of(images, number_in(asked["split.folds"]))
    return Grid(rest, backbones, own, alphas, most, asked["seed"], configs, images, prefer, select)


def first_words(asked: Asked, rest: list[str]) -> list[str]:
    """The words of L2 with the first backbone."""
    return [*rest, *(f"backbone={one}" for one in asked.get("backbone", [])[:1]), "reg=l2"]


def one_of(key: str, asked: Asked, known: tuple[str, ...]) -> str:
    """The value of a key of this command; the first of `known` if the command does not set it."""
    value = ",".join(asked.get(key, known[:1]))
    require(value in known, f"{key} must be one of {', '.join(known)}, got {value}.")
    return value


def number_in(folds: list[str]) -> int:
    """The number of folds in the words that set it."""
    require(
        len(folds) == 1 and folds[0].isdecimal() and int(folds[0]) > 1,
        f"split.folds must be one number, 2 or more, got {','.join(folds)}.",
    )
    return int(folds[0])


def asked_and_rest(words: list[str]) -> tuple[Asked, list[tuple[str, str]], list[str]]:
    """The compared values, the options of methods (key and word), and the words that all runs share.

    Raises UserError if another key has several values.
    """
    parser = OverridesParser.create()
    asked, of_methods, rest = {}, [], []
    for word in words:
        override = None if word.startswith("-") else parser.parse_override(word)
        require(
            override is None or override.package is None,
            f"{word}: +experiment=which_is_best compares single methods, and no sums.",
        )
        if override and override.key_or_group in (*COMPARED, *OF_WHICH_IS_BEST):
            asked[override.key_or_group] = values_of(override)
        elif word not in ("-m", "--multirun"):
            require(
                override is None or not override.is_sweep_override(),
                f"{word}: +experiment=which_is_best compares methods and backbones only: name one value.",
            )
            if override and override.key_or_group.startswith("reg."):
                of_methods.append((override.key_or_group, word))
            else:
                rest.append(word)
    return asked, of_methods, rest


def has(options: object, key: str) -> bool:
    """Whether a method with these options has the key, such as reg.attention.method."""
    for name in key.split(".")[1:]:
        found = options if isinstance(options, dict) else vars(options) if hasattr(options, "__dict__") else {}
        if name not in found:
            return False
        options = found[name]
    return True
