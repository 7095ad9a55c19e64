"""Explains errors of a command line: what is wrong with a word, the nearest known word, and what to type instead."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ..common.console import quoted
from ..common.errors import UserError
from ..common.options import OptionError, Options, as_word, describe
from ..engine.config import REGISTRIES, kinds_of_keys, takes, takes_list
from ..methods import METHODS

FUNCTIONS = ("choice", "range", "glob", "sort", "shuffle", "int", "float", "str", "bool", "tag")
OF_WHICH_IS_BEST = ("budget", "preset", "prefer", "select")  # keys of +experiment=which_is_best alone

# --- The nearest word ---


def one_of(choices: Iterable[str]) -> str:
    return f": one of {', '.join(choices)}" if choices else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one."""
    near = nearest(word, list(known))
    return f"; did you mean {near}?" if near else "."


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The nearest of the known words, if one is near. For keys with dots the last part also counts: lr, schedule.lr."""
    word = word.lower()
    last = word.rpartition(".")[2]
    if same := [one for one in known if one.rpartition(".")[2] == last]:
        return max(same, key=lambda one: difflib.SequenceMatcher(None, word, one).ratio())
    if near := difflib.get_close_matches(word, known, 1, 0.65):
        return near[0]
    ends = {one.rpartition(".")[2]: one for one in reversed(known)}
    near = difflib.get_close_matches(last, ends, 1, 0.7) if "." in "".join(known) else []
    return ends[near[0]] if near else None


# --- One word ---


def check_shape(words: Sequence[str], index: int, sign: str, key: str, value: str | None) -> None:
    """Raises UserError for a word that has no key or no value."""
    before = words[index - 1] if index else ""
    after = words[index + 1] if index + 1 < len(words) else ""
    word = words[index]
    if value is not None and value.endswith(",") and after and "=" not in after:  # reg=l2, delta
        whole = word + "".join(after.split())
        raise UserError(f"{word} {after}: a space ends a word. Type {quoted(whole)}")
    if value is None and "=" in (after, after[:1]) and word:  # reg = delta, reg =delta
        joined = f"{word}={after[1:] or (words[index + 2] if index + 2 < len(words) else 'VALUE')}"
        raise UserError(f"{word} {after}: there is no space around the sign =. Type {quoted(joined)}")
    if value is None and sign != "~":
        hint = ""
        if before.endswith("=") or ("=" in before and os.path.lexists(f"{before.partition('=')[2]} {word}")):
            hint = f" Type {quoted(f'{before}{word}' if before.endswith('=') else f'{before} {word}')}"
        elif group := next((group for group in ("dataset", "reg") if word in REGISTRIES[group]), None):
            hint = f" Type {group}={word}"
        elif os.path.lexists(word):
            hint = f" For images of your own type dataset=folder {quoted(f'dataset.root={word}')}"
        raise UserError(f"{quoted(word)} is not KEY=VALUE, such as reg=delta.{hint}")
    if not key:
        raise UserError(f"{quoted(word)} has no key: a word is KEY=VALUE, such as reg=delta.")
    if value == "":
        raise UserError(f"{word} has no value. Is a variable of the shell not set?")


def unreadable(word: str) -> UserError:
    """The error about a word that does not follow Hydra's grammar."""
    key, _, value = word.partition("=")
    if not re.fullmatch(r"(\+\+|\+|~)?[\w./$-]+(@[\w.:]+)?", key):
        return UserError(f"no key {quoted(key)}: a word is KEY=VALUE, such as reg=delta.")
    called = re.match(r"(\w+)\(", value)
    if called and called[1] not in FUNCTIONS:
        return UserError(f"{quoted(word)}: no function {called[1]}{did_you_mean(called[1], FUNCTIONS)}")
    kinds = f": {key} takes {' or '.join(sorted(takes(key)))}" if takes(key) else ""
    return UserError(
        f"{quoted(word)} cannot be read{kinds}. Several values are {key}=a,b and a range of whole numbers "
        f"{quoted(f'{key}=range(3)')}"
    )


# --- A configuration that cannot be composed ---


def explain(loader: ConfigLoader, config_name: str, words: Sequence[str]) -> UserError:
    """Finds what is wrong with the words of one job that Hydra cannot compose, by trying them one by one."""
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
    return UserError(f"These words do not go together: {' '.join(map(quoted, words))}")


def is_group(loader: ConfigLoader, override: Override) -> bool:
    group = override.key_or_group
    return override.package is not None or ("." not in group and bool(loader.get_group_options(group)))


def check_choice(loader: ConfigLoader, override: Override) -> None:
    """Raises OptionError if the group has no such choice."""
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
    """Sets the value of a word KEY=VALUE. Raises OptionError for an unknown key or a value that it cannot have."""
    key = override.key_or_group
    parent, name = parent_of(composed, key)
    added = override.is_add() or override.is_force_add()
    if parent is None or (name not in names_in(parent) and not (added and not fields_of(parent))):
        raise unknown_key(composed, key)
    if override.is_delete():
        if name in fields_of(parent):
            raise taken_away(key)
        with open_dict(parent):
            del parent[name]
        return
    if override.is_add() and name in names_in(parent):
        raise OptionError(key, f"{key} exists already: type {quoted(word.lstrip('+'))}")
    try:
        OmegaConf.update(composed, key, override.value(), merge=True, force_add=added)
    except OmegaConfBaseException:
        raise wrong_value(parent, name, word, override) from None


def parent_of(composed: DictConfig, key: str) -> tuple[DictConfig | None, str]:
    """The node that holds a key, if it is there, and the key's name in it."""
    node: object = composed
    *path, name = key.split(".")
    for part in path:
        if not isinstance(node, DictConfig) or part not in names_in(node) or OmegaConf.is_missing(node, part):
            return None, name
        node = node[part]
    return (node if isinstance(node, DictConfig) else None), name


def has_key(composed: DictConfig, key: str) -> bool:
    parent, name = parent_of(composed, key)
    return parent is not None and name in names_in(parent)


def unknown_key(composed: DictConfig, key: str, inside: str = "") -> OptionError:
    """The error about an unknown key. inside: the prefix of the keys of `composed`."""
    if key in OF_WHICH_IS_BEST:
        return OptionError(key, f"only +experiment=which_is_best has {key}=, to make runs or with dry_run=true.")
    known = [inside + one for one in dotted_keys(composed) if inside + one != key]
    if not key.startswith("hydra"):
        known = [one for one in known if not one.startswith("hydra.")]
    others = [
        f"reg={name}"
        for name, entry in METHODS.entries.items()
        if key in (f"reg.{each.name}" for each in describe(entry.options))
    ]
    if others and (reg := OmegaConf.select(composed, "reg.name")):
        return OptionError(key, f"no key {key} with reg={reg}: it belongs to {', '.join(sorted(others))}.")
    return OptionError(key, f"no key {key}{did_you_mean(key, [*known, *kinds_of_keys()])}")


def taken_away(key: str) -> OptionError:
    return OptionError(
        key, f"~{key}: every run has this key, and it cannot be removed. Without the word it keeps its default."
    )


def dotted_keys(node: DictConfig) -> Iterator[str]:
    """The keys of a configuration, from the outermost inwards."""
    names = names_in(node)
    yield from names
    for name in names:
        known = not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name)
        if known and isinstance(inner := node[name], DictConfig):
            yield from (f"{name}.{one}" for one in dotted_keys(inner))


def wrong_value(parent: DictConfig, name: str, word: str, override: Override) -> OptionError:
    """The error about a value of another type, with the values that the key takes."""
    key, group = override.key_or_group, group_of(parent)
    words = {one.name: one for one in describe(group)} if group else {}
    if name in words:
        typed = word.partition("=")[2]
        hint = f" Type {quoted(f'{key}=[{typed}]')}" if takes_list(key) and not typed.startswith("[") else ""
        return OptionError(key, f"{quoted(word)}: {key} takes {words[name].in_words} ({words[name].help}).{hint}")
    inner = [one for one in words if one.startswith(f"{name}.")]
    if inner:
        keys = ", ".join(f"{key.removesuffix(name)}{one}" for one in inner)
        return OptionError(key, f"{quoted(word)}: {key} is not a key, but the beginning of {keys}.")
    return OptionError(key, f"{quoted(word)}: {key} takes no such value.")


# --- The nodes of a composed configuration ---


def names_in(node: DictConfig) -> list[str]:
    return list(map(str, node))


def group_of(node: DictConfig) -> type[Options] | None:
    """The options that are a node's schema; None for a dictionary."""
    kind = OmegaConf.get_type(node)
    return kind if kind is not None and issubclass(kind, Options) else None


def fields_of(node: DictConfig) -> list[str]:
    """The names of a node's schema; none for a dictionary, which takes any name."""
    group = group_of(node)
    return [entry.name for entry in fields(group)] if group else []  # type: ignore[arg-type]
