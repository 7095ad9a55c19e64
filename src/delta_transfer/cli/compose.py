"""Hydra's part: makes a checked RunConfig of the command line and conf/. Nothing outside of cli/ knows Hydra.

A command has options in any place, and words KEY=VALUE. A key of free text (a path, a name) takes the shell's word
letter by letter. Other values follow Hydra's grammar: numbers, lists [a,b], and in a sweep a,b and range(3).
"""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ..common.console import quoted
from ..common.errors import UserError
from ..common.options import OptionError, Options, require
from ..engine.config import REGISTRIES, RunConfig, takes, takes_list
from ..engine.optimizers import ScheduleConfig
from ..engine.tasks import TASKS
from ..methods.sum import about_term
from ..models.named import NamedBackboneConfig
from ..models.zoo import BackboneConfig, GraphBackboneConfig
from .explain import (
    FUNCTIONS,
    check_shape,
    did_you_mean,
    explain,
    one_of,
    taken_away,
    unknown_choice,
    unknown_key,
    unreadable,
)
from .sources import CONF, sources_of

MULTIRUN = ("-m", "--multirun")
SHOWS = ("-h", "--help", "--hydra-help", "-sc", "--shell-completion", "-c", "--cfg", "-i", "--info")  # run nothing
VALUES = {  # the values of options that take one
    "-c": ("job", "hydra", "all"),
    "--cfg": ("job", "hydra", "all"),
    "-p": None,
    "--package": None,
    "-cd": None,
    "--config-dir": None,
}
INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # of -i, --info; may be left out
OPTIONS = (*MULTIRUN, *SHOWS, *VALUES, "--resolve", "--version")
CALL = re.compile(rf"({'|'.join(FUNCTIONS)})\(.*\)", re.DOTALL)
WORD = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=]*)(?:=(?P<value>.*))?", re.DOTALL)
# Texts that mean the same with and without quotes: no numbers, and not true, false or null.
PLAIN = re.compile(r"(?!(true|false|null|nan|inf)$)[A-Za-z_./][A-Za-z_./-]*[A-Za-z0-9_./-]*", re.IGNORECASE)
QUOTED = re.compile(r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\"", re.DOTALL)
GROUPS = ("dataset", "backbone", "reg", "schedule", "optimizer", "average")
WITHOUT_FILE = ("reg", "optimizer", "average")  # groups whose registered entries need no file


# --- The words of a command line ---


class UsageError(UserError):
    """An option that a command does not have."""


def split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of a command line with their values, and its other words. Raises UsageError."""
    options: list[str] = []
    words: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        if name not in OPTIONS:
            raise UsageError(f"no option {name}{did_you_mean(name, OPTIONS)}")
        if equals and name not in VALUES and name not in ("-i", "--info"):
            raise UsageError(f"{name} takes no value: type {name} alone.")
        options.append(word)
        if name in ("-i", "--info") and not equals and left and left[0] in INFOS:
            options.append(left.pop(0))
        if name in VALUES:
            if not equals:
                if not left:
                    raise UsageError(f"{name} needs a value{one_of(VALUES[name] or ())}.")
                options.append(value := left.pop(0))
            if (choices := VALUES[name]) and value not in choices:
                raise UsageError(f"{name} takes{one_of(choices).removeprefix(':')}, and not {value}.")
    return options, words


def option_value(options: Sequence[str], *names: str) -> str | None:
    """The value of an option, which split_options has checked."""
    for index, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name in names:
            return value if equals else options[index + 1]
    return None


def for_hydra(words: Sequence[str], several: bool) -> list[str]:
    """The words as Hydra has to read them. Raises UserError for a word that is not KEY=VALUE.

    several: the command is a sweep, in which commas separate values, unless the whole value is an existing path.
    """
    made = []
    for index, word in enumerate(words):
        match = WORD.fullmatch(word)
        assert match is not None
        sign, key, value = match["sign"] or "", match["key"], match["value"]
        if not key or not value or value.endswith(","):
            check_shape(words, index, sign, key, value)
        if key == "experiment" and not sign:
            sign = "+"
        elif sign != "~" and (key in GROUPS or key.startswith("hydra.") or takes(key)):
            sign = ""  # it is there, or refused
        word = sign + word.lstrip("+") if sign != "~" else word
        if value is not None and "text" in takes(key):
            word = f"{sign}{key}={_text(value, several, key == 'source' or takes_list(key))}"
        elif value is not None and takes_list(key) and re.fullmatch(r"\[[^][{}'\"]+\]", value):
            word = f"{sign}{key}=[{','.join(_text(one.strip(), False, False) for one in value[1:-1].split(','))}]"
        parsed(word)
        made.append(word)
    return made


def repeated(words: Sequence[str]) -> Iterator[str]:
    """A sentence for each key with two values. The last value counts, as scripts that pass "$@" expect."""
    values: dict[str, str] = {}
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if values.get(key, value) != value:
            yield f"{key} is given more than once: {quoted(f'{key}={value}')} counts"
        values[key] = value


def _text(value: str, several: bool, may_be_structure: bool) -> str:
    exists = os.path.lexists(os.path.expanduser(value))
    if not exists:
        if value == "null" or QUOTED.fullmatch(value) or (may_be_structure and value[0] in "[{"):
            return value
        if several and CALL.fullmatch(value):
            return value
        if several and "," in value:
            return ",".join(_text(one.strip(), False, False) for one in value.split(","))
    if value == "~" or value.startswith("~/"):
        value = os.path.expanduser(value)
    if PLAIN.fullmatch(value):
        return value
    if exists or not re.search(r"\$\{[^{}]+\}", value):  # else it refers to another key
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return QuotedString(value, Quote.single).with_quotes()


def parsed(word: str) -> Override:
    """The parsed word. Raises UserError if it does not follow Hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        raise unreadable(word) from None


# --- Configurations ---


def register_schemas() -> None:
    """Registers the options of all entries of the registries with Hydra, and choices for entries without a file.

    The group `schema` is hidden: reg=glob(*) sweeps methods, not schemas.
    """
    # A dry run writes nothing into results_dir, not even Hydra's record of a sweep.
    OmegaConf.register_new_resolver("sweep_dir", _sweep_dir, replace=True)
    _store("schema", "run", RunConfig)
    for task in TASKS:  # data sets for a task that is not the default bring it
        _store("schema/task", task, {"task": task})
    _store("schema/backbone", "network", BackboneConfig)
    _store("schema/backbone", "graph_network", GraphBackboneConfig)
    _store("schema/backbone", "named", NamedBackboneConfig)
    _store("schema/schedule", "schedule", ScheduleConfig)
    conf = files(CONF)
    for group, registry in REGISTRIES.items():
        for name, entry in registry.entries.items():
            _store(f"schema/{group}", name, entry.options)
            if group in WITHOUT_FILE and not (conf / group / f"{name}.yaml").is_file():
                _store(group, name, {"defaults": [{f"/schema/{group}@_here_": name}, "_self_"], "name": name})


def _store(group: str, name: str, node: object) -> None:
    """Stores a node, unless it was stored before, since that is slow."""
    if _stored.get((group, name)) != node:
        ConfigStore.instance().store(name, node, group)
        _stored[group, name] = node


_stored: dict[tuple[str, str], object] = {}


def _sweep_dir(results_dir: str, dry_run: bool) -> str:
    return str(Path(tempfile.gettempdir()) / "delta-run-dry") if dry_run else f"{results_dir}/sweep"


@contextmanager
def running_hydra(config_dir: str | None = None) -> Iterator[ConfigLoader]:
    """Hydra's reader of conf/ and of the folder `config_dir`."""
    register_schemas()
    if GlobalHydra.instance().is_initialized():  # in a job
        yield GlobalHydra.instance().config_loader()
        return
    with initialize_config_module(CONF, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        if config_dir:
            loader.get_search_path().prepend("command-line", f"file://{Path(config_dir).absolute()}")
            loader.repository.initialize_sources(loader.get_search_path())  # type: ignore[attr-defined]
        yield loader


def compose_config(config_name: str, words: Sequence[str]) -> RunConfig:
    """The checked configuration of conf/<config_name>.yaml with `words`, as the user types them. Raises UserError."""
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
    """A composed configuration as options. Raises UserError, also for anything that would be ignored."""
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
            for name in terms:  # one by one, so that a message can name the term
                with about_term(name):
                    OmegaConf.to_object(OmegaConf.create({"term": terms[name]}))
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:  # from interpolations, which are resolved only here
        key = error.full_key or "configuration"
        raise OptionError(
            key,
            f"{key}: its value refers (${{...}}) to a key or variable that does not exist, or is of another type.",
        ) from None
    assert isinstance(config, RunConfig)
    config = config.replace(backbone=config.backbone.complete())
    if config.source is not None:
        config.source = sources_of(config.source)
    probe = config.evaluate.probe
    if isinstance(probe, str) and "/" not in probe and not Path(probe).is_dir():  # a name of conf/dataset
        config.evaluate.probe = compose_dataset(probe, [f"data_dir={config.data_dir}"]).dataset
    return config


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises OptionError for a file of experiment/values that does not exist, in a running Hydra.

    The group is optional, so that an experiment may ask for `<dataset>_<reg>` when only some pairs have values.
    """
    for override in overrides:
        if override.lstrip("+").startswith("experiment/values="):
            known = GlobalHydra.instance().config_loader().get_group_options("experiment/values")
            name = override.partition("=")[2]
            if name not in known:
                raise unknown_choice("experiment/values", name, known)


def check_values(overrides: Sequence[str], config: RunConfig) -> None:
    """Raises OptionError if a command sets a value that would be ignored.

    These are the number of iterations of a schedule that counts in epochs, and beta and weight decay of a sum's term,
    which belong to the sum.
    """
    epochs = config.schedule.epochs
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "schedule.iterations" and value != "null" and epochs is not None:
            raise OptionError(
                key,
                f"{override}: schedule.epochs={epochs} sets the length of this schedule. To count iterations, add "
                "schedule.epochs=null.",
            )
        if term := re.fullmatch(r"reg\.terms\.[^.]+\.(beta|weight_decay)", key):
            raise OptionError(key, f"{override}: a sum has one reg.{term[1]} for all its terms: set that.")


def check_keys(composed: DictConfig, prefix: str = "") -> None:
    """Raises OptionError for a key that no schema has (+reg.alhpa=1), and for a removed one (~reg.alpha)."""
    kind, names = OmegaConf.get_type(composed) or dict, list(map(str, composed))
    if issubclass(kind, Options):
        known = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
        for name in names:
            if name not in known and name != "hydra":
                raise unknown_key(composed, prefix + name, inside=prefix)
        if gone := [name for name in known if name not in names]:
            raise taken_away(prefix + gone[0])
    for name in names:
        skipped = name == "hydra" or OmegaConf.is_missing(composed, name) or OmegaConf.is_interpolation(composed, name)
        if not skipped and isinstance(group := composed[name], DictConfig):
            check_keys(group, f"{prefix}{name}.")
