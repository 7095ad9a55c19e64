"""Hydra's part: the command line and conf/ become a checked RunConfig. Nothing outside of cli/ knows Hydra."""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..common.errors import UserError
from ..common.options import OptionError, Options, as_word, describe, from_mapping, require
from ..data.registry import READERS
from ..engine.callbacks import AVERAGES
from ..engine.config import RunConfig
from ..engine.optimizers import OPTIMIZERS, ScheduleConfig
from ..engine.tasks import TASKS
from ..methods import METHODS
from ..methods.sum import about_term
from ..models.sources import SourceConfig
from ..models.zoo import BackboneConfig, GraphBackboneConfig, options_of_backbone
from ..records.cards import SUFFIX, read_card

CONF = "delta_transfer.conf"


def register_schemas() -> None:
    """Tells Hydra the options of everything in the registries.

    The group `schema` is hidden: reg=glob(*) sweeps methods, not schemas. Optimizers and averages need no file.
    """
    # A dry run writes nothing into results_dir, not even Hydra's record of a sweep.
    OmegaConf.register_new_resolver("sweep_dir", _sweep_dir, replace=True)
    OmegaConf.register_new_resolver("described_keys", _described_keys, replace=True)
    _store("schema", "run", RunConfig)
    for task in TASKS:  # data sets for another task than the default bring it
        _store("schema/task", task, {"task": task})
    _store("schema/backbone", "network", BackboneConfig)
    _store("schema/backbone", "graph_network", GraphBackboneConfig)
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


def _described_keys(_root_: DictConfig) -> str:
    """For --help: every key of a composed configuration with its value, and what it is."""

    def group_of(node: DictConfig) -> type[Options] | None:
        kind = OmegaConf.get_type(node)
        return kind if kind is not None and issubclass(kind, Options) else None

    def lines(node: DictConfig, prefix: str) -> Iterator[str]:
        group = group_of(node)
        words = {each.name: each.help for each in describe(group)} if group else {}
        for name in map(str, node if prefix else [name for name in node if name != "hydra"]):
            key, value = f"{prefix}{name}", "???" if OmegaConf.is_missing(node, name) else node[name]
            if isinstance(value, DictConfig) and (group_of(value) or key == "reg.terms"):
                yield from lines(value, f"{key}.")
            else:
                setting = f"{key}={as_word(OmegaConf.to_object(value) if OmegaConf.is_config(value) else value)}"
                says = words.get(name, "")  # a group that is null has none
                yield f"{setting}\n{'':40} {says}" if len(setting) > 40 else f"{setting:40} {says}".rstrip()

    return "\n".join(lines(_root_, "")).replace("$", "$$")  # Hydra's template is a string.Template


def compose_config(config_name: str, overrides: Sequence[str]) -> RunConfig:
    """The checked configuration of conf/<config_name>.yaml with `overrides`. Raises UserError."""
    register_schemas()
    try:
        if GlobalHydra.instance().is_initialized():  # within a job
            composed = compose(config_name, list(overrides))
        else:
            with initialize_config_module(CONF, version_base="1.3"):
                composed = compose(config_name, list(overrides))
                check_overrides(overrides)
        config = to_run_config(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error)) from error
    check_values(overrides, config)
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
        raise UserError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, RunConfig)
    config.source = sources_of(config.source)
    return config


def words_of_job() -> list[str]:
    """The overrides that this job was composed from, in a running Hydra. Their interpolations are not resolved."""
    words = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(words, list)
    return words


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises OptionError for a file of experiment/values that does not exist, in a running Hydra.

    The group is optional, so that an experiment may ask for `<dataset>_<reg>` where only some pairs have values.
    """
    for override in overrides:
        if override.lstrip("+").startswith("experiment/values="):
            known = GlobalHydra.instance().config_loader().get_group_options("experiment/values")
            name = override.partition("=")[2]
            if name not in known:
                raise OptionError("experiment/values", f"experiment/values={name}: there is only {', '.join(known)}.")


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


def choices(group: str) -> list[str]:
    """The files of a group of conf/."""
    folder = files(CONF) / group
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


# --- source= ---


def sources_of(entries: object) -> list[SourceConfig] | None:
    """The source networks that `source=` names, in its order.

    An entry is one of
        path/model.safetensors             written by delta-pretrain, or its run's folder; its model card says which
                                           network it is
        resnet34                           a file of conf/backbone, with its weights and taps
        resnet34:path/weights.safetensors  the same with other weights
        {use: one of these, taps: [...]}   the same with other taps

    Raises UserError for anything else, and for a network or a model card that does not exist.
    """
    if entries is None:
        return None
    named = entries if isinstance(entries, list) else [entries]
    require(bool(named), "source=[] names no network: null stands for the one that backbone.weights names.")
    found: list[SourceConfig] = []
    for entry in named:
        backbone, expected = _described(_checked(entry))
        # The second and later ones of a network are called resnet32_2, resnet32_3.
        count = 1 + sum(other.backbone.name == backbone.name for other in found)
        name = backbone.name if count == 1 else f"{backbone.name}_{count}"
        found.append(SourceConfig(name=name, backbone=backbone, expected=expected))
    return found


def _checked(entry: object) -> dict[str, Any]:
    mapping = entry if isinstance(entry, dict) else {"use": entry}
    taps = mapping.get("taps", [])
    named = mapping.keys() <= {"use", "taps"} and isinstance(mapping.get("use"), str) and bool(mapping["use"])
    if not (named and isinstance(taps, list) and all(isinstance(tap, str) for tap in taps)):
        raise OptionError(
            "source",
            "source is a .safetensors file of delta-pretrain's, a name of conf/backbone, NAME:WEIGHTS, or "
            f"{{use: one of these, taps: [...]}}, or a list of them, got {entry!r}.",
        )
    return mapping


def _described(entry: dict[str, Any]) -> tuple[BackboneConfig, str | None]:
    """The network of an entry, and the fingerprint of its weights where a model card gives it."""
    use: str = entry["use"]
    of_run = Path(use).expanduser() / f"model{SUFFIX}"
    if "/" in use and of_run.is_file():  # a name without a slash names a network
        use = str(of_run)
    name, _, weights = use.partition(":")
    expected = None
    if name.endswith(SUFFIX):
        card = read_card(Path(use).expanduser())
        try:
            backbone = from_mapping(BackboneConfig, card["network"] | {"weights": use})
        except (OptionError, TypeError) as error:
            raise UserError(f"source: the model card of {use} cannot be used: {error}") from None
        expected = card["weights_fingerprint"]
    else:
        backbone = named_backbone(name)
        backbone = backbone.replace(weights=weights or backbone.weights)
    try:
        return backbone.replace(taps=list(entry.get("taps", backbone.taps))), expected
    except UserError as error:
        raise UserError(f"source={use}: {error}") from None


def named_backbone(name: str) -> BackboneConfig:
    """The network of a file of conf/backbone."""
    known = choices("backbone")
    require(
        name in known,
        f"source={name} is neither a {SUFFIX} file of delta-pretrain's nor one of conf/backbone: {', '.join(known)}.",
    )
    values = OmegaConf.create((files(CONF) / "backbone" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(values, DictConfig)
    del values["defaults"]  # it names the schema
    return from_mapping(options_of_backbone(name), OmegaConf.to_container(values))  # type: ignore[arg-type]


@contextmanager
def hydra_raises() -> Iterator[None]:
    """Within this Hydra raises its errors, as it does for HYDRA_FULL_ERROR, and prints nothing."""
    asked = "HYDRA_FULL_ERROR" in os.environ
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        yield
    finally:
        if not asked:
            del os.environ["HYDRA_FULL_ERROR"]


def in_our_words(error: Exception) -> str:
    """What to tell a person about an error of the configuration or of a launcher."""
    reason = "\n".join(str(e) for e in (error, error.__cause__) if e) or type(error).__name__
    if "schema/reg@reg" in reason:  # reg=[lwf,at]
        return "reg is one method: the sum of two is reg=sum +reg@reg.terms.lwf=lwf +reg@reg.terms.at=at."
    if isinstance(error, HydraException) and "Unknown function" in reason:  # dataset.root=photos (1)
        reason += "\nA value with brackets is quoted twice, once for the shell: \"dataset.root='photos (1)'\""
    return reason
