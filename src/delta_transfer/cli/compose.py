"""Hydra's part: the command line and conf/ become a checked RunConfig. Nothing outside of cli/ knows Hydra."""

import dataclasses
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ..common.console import quoted
from ..common.errors import UserError
from ..common.options import OptionError, Options, as_word, describe, require
from ..data.registry import READERS
from ..engine.callbacks import AVERAGES
from ..engine.config import RunConfig
from ..engine.optimizers import OPTIMIZERS, ScheduleConfig
from ..engine.tasks import TASKS
from ..methods import METHODS
from ..methods.sum import about_term
from ..models.named import NamedBackboneConfig
from ..models.zoo import BackboneConfig, GraphBackboneConfig
from .sources import CONF, sources_of
from .words import MULTIRUN, did_you_mean, for_hydra, kinds_of_keys, nearest, takes_list

KEYS_OF_METHODS = {
    name: frozenset(f"reg.{each.name}" for each in describe(entry.options)) for name, entry in METHODS.entries.items()
}


def register_schemas() -> None:
    """Tells Hydra the options of everything in the registries.

    The group `schema` is hidden: reg=glob(*) sweeps methods, not schemas. Optimizers and averages need no file.
    """
    # A dry run writes nothing into results_dir, not even Hydra's record of a sweep.
    OmegaConf.register_new_resolver("sweep_dir", _sweep_dir, replace=True)
    _store("schema", "run", RunConfig)
    for task in TASKS:  # data sets for another task than the default bring it
        _store("schema/task", task, {"task": task})
    _store("schema/backbone", "network", BackboneConfig)
    _store("schema/backbone", "graph_network", GraphBackboneConfig)
    _store("schema/backbone", "named", NamedBackboneConfig)
    _store("schema/schedule", "schedule", ScheduleConfig)
    for group, registry in (
        ("schema/dataset", READERS),
        ("schema/reg", METHODS),
        ("optimizer", OPTIMIZERS),
        ("average", AVERAGES),
    ):
        for name, entry in registry.entries.items():
            _store(group, name, entry.options)


def _store(group: str, name: str, node: object) -> None:
    """Does nothing for what was stored before: it is slow."""
    if _stored.get((group, name)) != node:
        ConfigStore.instance().store(name, node, group)
        _stored[group, name] = node


_stored: dict[tuple[str, str], object] = {}


def _sweep_dir(results_dir: str, dry_run: bool) -> str:
    return str(Path(tempfile.gettempdir()) / "delta-run-dry") if dry_run else f"{results_dir}/sweep"


@contextmanager
def running_hydra(config_dir: str | None = None) -> Iterator[ConfigLoader]:
    """Hydra's reader of conf/, and of a folder of one's own."""
    register_schemas()
    if GlobalHydra.instance().is_initialized():  # within a job
        yield GlobalHydra.instance().config_loader()
        return
    with initialize_config_module(CONF, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        if config_dir:
            loader.get_search_path().prepend("command-line", f"file://{Path(config_dir).absolute()}")
            loader.repository.initialize_sources(loader.get_search_path())  # type: ignore[attr-defined]
        yield loader


def compose_config(config_name: str, words: Sequence[str]) -> RunConfig:
    """The checked configuration of conf/<config_name>.yaml with `words`, as a person types them. Raises UserError."""
    words = for_hydra(words, several=False)
    with running_hydra() as loader:
        return checked_config(compose(loader, config_name, words), words)


def is_sweep(config_name: str, options: Sequence[str], words: Sequence[str], config_dir: str | None) -> bool:
    """Whether a command asks for several runs: by -m, or by an experiment that is a sweep."""
    if set(options) & set(MULTIRUN):
        return True
    words = [word for word in words if word.lstrip("+").startswith(("experiment=", "hydra.mode="))]
    if not words:
        return False
    with running_hydra(config_dir) as loader:
        return bool(compose(loader, config_name, for_hydra(words, False)).hydra.mode == RunMode.MULTIRUN)


def compose(loader: ConfigLoader, config_name: str, words: Sequence[str]) -> DictConfig:
    """The configuration of one job, with Hydra's own options below `hydra`. Raises UserError."""
    try:
        return loader.load_configuration(config_name, list(words), RunMode.RUN)
    except Exception:  # of many types
        raise explain(loader, config_name, words) from None


def checked_config(composed: DictConfig, words: Sequence[str]) -> RunConfig:
    """A composed configuration as options, and nothing in it or in `words` that would be ignored. Raises UserError."""
    check_keys(composed)
    if "hydra" in composed:
        composed = composed.copy()
        with open_dict(composed):
            del composed["hydra"]
    check_overrides(words)
    config = to_run_config(composed)
    check_values(words, config)
    return config


def compose_dataset(name: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of `delta-run dataset=<name> <overrides>`. Raises UserError."""
    return compose_config("config", [f"dataset={name}", *overrides])


def to_run_config(composed: DictConfig) -> RunConfig:
    """The composed configuration as checked options."""
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        require(not missing, f"No value for: {', '.join(missing)}.")
        if OmegaConf.is_dict(terms := OmegaConf.select(composed, "reg.terms")):
            for name in terms:  # one by one, so that a message names the term
                with about_term(name):
                    OmegaConf.to_object(OmegaConf.create({"term": terms[name]}))
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:  # of interpolations, which are resolved only here
        key = error.full_key or "configuration"
        raise OptionError(
            key,
            f"{key}: its value refers (${{...}}) to no key or variable that is here, or to one of another type.",
        ) from None
    assert isinstance(config, RunConfig)
    config = config.replace(backbone=config.backbone.complete())
    config.source = sources_of(config.source)
    probe = config.evaluate.probe
    if isinstance(probe, str) and "/" not in probe and not Path(probe).is_dir():  # a name of conf/dataset
        config.evaluate.probe = compose_dataset(probe, [f"data_dir={config.data_dir}"]).dataset
    return config


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises OptionError for a file of experiment/values that does not exist, in a running Hydra.

    The group is optional, so that an experiment may ask for `<dataset>_<reg>` where only some pairs have values.
    """
    for override in overrides:
        if override.lstrip("+").startswith("experiment/values="):
            known = GlobalHydra.instance().config_loader().get_group_options("experiment/values")
            name = override.partition("=")[2]
            if name not in known:
                raise unknown_choice("experiment/values", name, known)


def check_values(overrides: Sequence[str], config: RunConfig) -> None:
    """Raises OptionError if a command sets what would be ignored in silence.

    That is the number of iterations of a schedule that counts in epochs, and beta and weight decay of a sum's term,
    which belong to the sum.
    """
    epochs = config.schedule.epochs
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "schedule.iterations" and value != "null" and epochs is not None:
            raise OptionError(
                key,
                f"{override}: this schedule is as long as schedule.epochs={epochs} says. To count iterations, add "
                "schedule.epochs=null.",
            )
        if term := re.fullmatch(r"reg\.terms\.[^.]+\.(beta|weight_decay)", key):
            raise OptionError(key, f"{override}: a sum has one reg.{term[1]} for all its terms.")


def check_keys(composed: DictConfig, prefix: str = "") -> None:
    """Raises OptionError for a key that no schema has (+reg.alhpa=1), and for one that was taken away (~reg.alpha)."""
    known = _fields(composed)
    names = _names(composed)
    for name in names if known else ():
        if name not in known and name != "hydra":
            raise unknown_key(composed, prefix + name, inside=prefix)
    for name in (
        known if issubclass(OmegaConf.get_type(composed) or dict, Options) else ()
    ):  # Hydra takes some of its own
        if name not in names:
            raise taken_away(prefix + name)
    for name, node in _inner(composed):
        if name != "hydra":  # which Hydra itself changes
            check_keys(node, f"{prefix}{name}.")


def _names(node: DictConfig) -> list[str]:
    return list(map(str, node))


def _inner(node: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """The groups and dictionaries in a node."""
    for name in node:
        known = not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, str(name))
        if known and isinstance(inner := node[name], DictConfig):
            yield str(name), inner


def _fields(node: DictConfig) -> dict[str, type]:
    """The names that a node's schema has; none of a dictionary, which takes any."""
    kind = OmegaConf.get_type(node)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return {}
    return {entry.name: entry.type for entry in dataclasses.fields(kind)}  # type: ignore[misc]


# --- Errors in our words ---


def explain(loader: ConfigLoader, config_name: str, words: Sequence[str]) -> UserError:
    """What is wrong with the words of one job, which Hydra cannot compose: they are tried one by one."""
    parser = OverridesParser.create(config_loader=loader)
    overrides = [(word, parser.parse_overrides([word])[0]) for word in words]
    try:
        for word, override in overrides:
            if override.is_sweep_override():
                raise several_values(word, override)
        of_groups = []
        for word, override in overrides:
            if is_group(loader, override):
                check_choice(loader, override)
                of_groups.append(word)
                try:
                    base = loader.load_configuration(config_name, of_groups, RunMode.RUN)
                except Exception:
                    raise UserError(f"{quoted(word)} cannot be used here.") from None
        base = loader.load_configuration(config_name, of_groups, RunMode.RUN)
        for word, override in overrides:
            if word not in of_groups:
                apply(base, word, override)
    except UserError as error:
        return error
    return UserError(f"These words make no configuration together: {' '.join(map(quoted, words))}")


def is_group(loader: ConfigLoader, override: Override) -> bool:
    group = override.key_or_group
    return override.package is not None or ("." not in group and bool(loader.get_group_options(group)))


def check_choice(loader: ConfigLoader, override: Override) -> None:
    """Raises OptionError if a group has no such choice."""
    group, value = override.key_or_group, override.value()
    known = loader.get_group_options(group)
    if override.is_delete():
        return
    if isinstance(value, list | dict):
        several = " The sum of two is reg=sum +reg@reg.terms.lwf=lwf +reg@reg.terms.at=at" if group == "reg" else ""
        raise OptionError(group, f"{group} is one choice, such as {group}={known[0]}.{several}")
    for name in override.sweep_string_iterator() if override.is_sweep_override() else [as_word(value)]:
        if name not in known:
            raise unknown_choice(group, name, known)


def unknown_choice(group: str, name: str, known: Sequence[str]) -> OptionError:
    folder = f"dataset=folder {quoted(f'dataset.root={name}')}" if group == "dataset" and Path(name).is_dir() else ""
    meant = f". For a folder of images type {folder}." if folder else did_you_mean(name, known)
    return OptionError(group, f"no {group} {name}{meant} Choices: {', '.join(known)}")


def several_values(word: str, override: Override) -> OptionError:
    key, _, values = word.partition("=")
    alternative = f" A list is {quoted(f'{key}=[{values}]')}." if takes_list(key) else ""
    return OptionError(
        override.key_or_group,
        f"{quoted(word)} names several values. delta-run -m makes a run for each; without -m name one.{alternative}",
    )


def apply(composed: DictConfig, word: str, override: Override) -> None:
    """Sets what a KEY=VALUE says. Raises OptionError for a key that is not there, or a value that it does not take."""
    key = override.key_or_group
    parent, name = parent_of(composed, key)
    added = override.is_add() or override.is_force_add()
    if parent is None or (name not in _names(parent) and not (added and not _fields(parent))):
        raise unknown_key(composed, key)
    if override.is_delete():
        if name in _fields(parent):
            raise taken_away(key)
        with open_dict(parent):
            del parent[name]
        return
    if override.is_add() and name in _names(parent):
        raise OptionError(key, f"{key} is there already: type {quoted(word.lstrip('+'))}")
    try:
        OmegaConf.update(composed, key, override.value(), merge=True, force_add=added)
    except OmegaConfBaseException:
        raise wrong_value(parent, name, word, override) from None


def parent_of(composed: DictConfig, key: str) -> tuple[DictConfig | None, str]:
    """The node that holds a key, if it is there, and the key's name in it."""
    node: object = composed
    *path, name = key.split(".")
    for part in path:
        if not isinstance(node, DictConfig) or part not in _names(node) or OmegaConf.is_missing(node, part):
            return None, name
        node = node[part]
    return (node if isinstance(node, DictConfig) else None), name


def has_key(composed: DictConfig, key: str) -> bool:
    parent, name = parent_of(composed, key)
    return parent is not None and name in _names(parent)


def unknown_key(composed: DictConfig, key: str, inside: str = "") -> OptionError:
    """inside: what stands before the keys of `composed`."""
    known = [inside + one for one in dotted_keys(composed) if inside + one != key]
    if not key.startswith("hydra"):
        known = [one for one in known if not one.startswith("hydra.")]
    others = [f"reg={name}" for name, keys in KEYS_OF_METHODS.items() if key in keys]
    if others and (reg := OmegaConf.select(composed, "reg.name")):
        return OptionError(key, f"no key {key} with reg={reg}: it belongs to {', '.join(sorted(others))}.")
    return OptionError(key, f"no key {key}{did_you_mean(key, known if nearest(key, known) else kinds_of_keys())}")


def taken_away(key: str) -> OptionError:
    return OptionError(
        key, f"~{key}: every run has this key, and it cannot be taken away. Without the word it keeps its default."
    )


def dotted_keys(node: DictConfig) -> Iterator[str]:
    """The keys of a configuration, from the outermost inwards."""
    yield from _names(node)
    for name, inner in _inner(node):
        yield from (f"{name}.{one}" for one in dotted_keys(inner))


def wrong_value(parent: DictConfig, name: str, word: str, override: Override) -> OptionError:
    """A value of another type: what the key takes."""
    key, group = override.key_or_group, OmegaConf.get_type(parent)
    words = {one.name: one for one in describe(group)} if group and issubclass(group, Options) else {}
    if name in words:
        typed = word.partition("=")[2]
        hint = f" Type {quoted(f'{key}=[{typed}]')}" if takes_list(key) and not typed.startswith("[") else ""
        return OptionError(key, f"{quoted(word)}: {key} takes {words[name].in_words} ({words[name].help}).{hint}")
    inner = [one for one in words if one.startswith(f"{name}.")]
    if inner:
        keys = ", ".join(f"{key.removesuffix(name)}{one}" for one in inner)
        return OptionError(key, f"{quoted(word)}: {key} is no key, but the beginning of {keys}.")
    return OptionError(key, f"{quoted(word)}: {key} takes no such value.")
