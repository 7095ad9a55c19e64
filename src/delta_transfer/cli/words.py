"""The words of a command line: options anywhere, and KEY=VALUE, made into what Hydra's grammar takes.

A key of free text (a path, a name) takes what the shell passes, letter by letter. Other values follow Hydra's grammar:
numbers, lists [a,b], and in a sweep a,b and range(3).
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from ..common.console import quoted
from ..common.errors import UserError
from ..common.options import Options, Registry, describe
from ..data.registry import READERS
from ..engine.callbacks import AVERAGES
from ..engine.config import RunConfig
from ..engine.optimizers import OPTIMIZERS
from ..methods import METHODS
from ..models.zoo import BackboneConfig, GraphBackboneConfig

MULTIRUN = ("-m", "--multirun")
SHOWS = ("-h", "--help", "--hydra-help", "-sc", "--shell-completion", "-c", "--cfg", "-i", "--info")  # and run nothing
VALUES = {  # of options that take one
    "-c": ("job", "hydra", "all"),
    "--cfg": ("job", "hydra", "all"),
    "-p": None,
    "--package": None,
    "-cd": None,
    "--config-dir": None,
}
INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # of -i, --info; may be left out
OPTIONS = (*MULTIRUN, *SHOWS, *VALUES, "--resolve", "--version")
FUNCTIONS = ("choice", "range", "glob", "sort", "shuffle", "int", "float", "str", "bool", "tag")
CALL = re.compile(rf"({'|'.join(FUNCTIONS)})\(.*\)", re.DOTALL)
WORD = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=]*)(?:=(?P<value>.*))?", re.DOTALL)
# Means the same with and without quotes: no number, and no true, false or null.
PLAIN = re.compile(r"(?!(true|false|null|nan|inf)$)[A-Za-z_./][A-Za-z_./-]*[A-Za-z0-9_./-]*", re.IGNORECASE)
QUOTED = re.compile(r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\"", re.DOTALL)
TERM = re.compile(r"reg\.terms\.[^.]+\.")


REGISTRIES: dict[str, Registry] = {"dataset": READERS, "reg": METHODS, "optimizer": OPTIMIZERS, "average": AVERAGES}
GROUPS = ("dataset", "backbone", "reg", "schedule", "optimizer", "average")


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


def one_of(choices: Iterable[str]) -> str:
    return f": one of {', '.join(choices)}" if choices else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about a word that nobody knows: the nearest one that is known."""
    near = nearest(word, list(known))
    return f"; did you mean {near}?" if near else "."


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The nearest of some words, if one is near. Of keys with dots the last part counts as well: lr, schedule.lr."""
    last = word.rpartition(".")[2]
    if same := [one for one in known if one.rpartition(".")[2] == last]:
        return max(same, key=lambda one: difflib.SequenceMatcher(None, word, one).ratio())
    if near := difflib.get_close_matches(word, known, 1, 0.65):
        return near[0]
    ends = {one.rpartition(".")[2]: one for one in reversed(known)}
    near = difflib.get_close_matches(last, ends, 1, 0.7) if "." in "".join(known) else []
    return ends[near[0]] if near else None


# --- Values ---


@cache
def kinds_of_keys() -> dict[str, set[str]]:
    """The types of each key, of which a choice of its group has one. Those of a sum's terms stand as those of reg."""
    groups: list[tuple[str, type[Options]]] = [
        ("", RunConfig),
        ("backbone.", BackboneConfig),
        ("backbone.", GraphBackboneConfig),
    ]
    groups += [(f"{key}.", entry.options) for key, known in REGISTRIES.items() for entry in known.entries.values()]
    kinds: dict[str, set[str]] = {"source": {"text"}}
    for prefix, group in groups:
        for one in describe(group):
            kinds.setdefault(f"{prefix}{one.name}", set()).add("text" if one.is_text else one.in_words)
    return kinds


def takes(key: str) -> set[str]:
    return kinds_of_keys().get(TERM.sub("reg.", key), set())


def takes_list(key: str) -> bool:
    return any(kind.startswith("a list") for kind in takes(key))


def for_hydra(words: Sequence[str], several: bool) -> list[str]:
    """The words as Hydra has to read them. Raises UserError for one that is no KEY=VALUE.

    several: the command is a sweep, in which a comma stands between values. The whole value is one path if it exists.
    """
    made = []
    for index, word in enumerate(words):
        match = WORD.fullmatch(word)
        assert match is not None
        sign, key, value = match["sign"] or "", match["key"], match["value"]
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
    """A sentence for each key that is there with two values. The last one counts, as scripts expect that pass "$@"."""
    values: dict[str, str] = {}
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if values.get(key, value) != value:
            yield f"{key} is there more than once: {quoted(f'{key}={value}')} counts"
        values[key] = value


def for_sweep(words: Sequence[str]) -> list[str]:
    """The words of a sweep. What belongs to a choice waits for the jobs, since others may come before that choice.

    Hydra composes the words with one value without those of several, and then each job with all of them.
    """
    made = []
    for word in words:
        override = parsed(word)
        group, dot, _ = override.key_or_group.partition(".")
        if dot and group in GROUPS and not override.is_delete() and not override.is_sweep_override():
            key, _, value = word.partition("=")
            word = f"{key}=choice({value})"
        made.append(word)
    return made


def first_values(words: Sequence[str]) -> list[str]:
    """The words of the first job of a sweep."""
    overrides = [(word, parsed(word)) for word in words]
    return [
        f"{one.get_key_element()}={next(iter(one.sweep_string_iterator()))}" if one.is_sweep_override() else word
        for word, one in overrides
    ]


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
        raise UserError(f"{quoted(word)} is no KEY=VALUE, such as reg=delta.{hint}")
    if not key:
        raise UserError(f"{quoted(word)} has no key: a word is KEY=VALUE, such as reg=delta.")
    if value == "":
        raise UserError(f"{word} has no value. (A shell's variable that is not set is empty.)")


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
    """Raises UserError for a word that Hydra's grammar does not have."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        pass
    key, _, value = word.partition("=")
    if not re.fullmatch(r"(\+\+|\+|~)?[\w./$-]+(@[\w.:]+)?", key):
        raise UserError(f"no key {quoted(key)}: a word is KEY=VALUE, such as reg=delta.")
    called = re.match(r"(\w+)\(", value)
    if called and called[1] not in FUNCTIONS:
        raise UserError(f"{quoted(word)}: no function {called[1]}{did_you_mean(called[1], FUNCTIONS)}")
    kinds = f": {key} takes {' or '.join(sorted(takes(key)))}" if takes(key) else ""
    raise UserError(
        f"{quoted(word)} cannot be read{kinds}. Several values are {key}=a,b and a range of whole numbers "
        f"{quoted(f'{key}=range(3)')}"
    )
