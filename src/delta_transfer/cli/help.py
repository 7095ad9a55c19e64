"""delta-run --help and delta-run help GROUP: the choices, with a sentence for each.

The sentence of a choice is the first one after the command in the comment of its file, in conf/ or in --config-dir. A
method, an optimizer or an average without one has the first line of its docstring, or its title.
"""

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig, OmegaConf

from ..common.console import log
from ..common.options import as_word, describe
from ..engine.config import REGISTRIES
from .compose import GROUPS, WITHOUT_FILE
from .explain import did_you_mean, group_of
from .sources import choices

WIDTH = 80
GROUPS_WITH_HELP = (*GROUPS, "experiment", "experiment/values")
# The keys that most users change first. --help with a choice, such as --help reg=delta, has all keys.
FIRST_KEYS = (
    *("data_dir", "dataset.root", "dataset.name", "dataset.images_per_class"),
    *("backbone.weights", "backbone.image_size", "reg.alpha", "reg.beta"),
    *("schedule.iterations", "schedule.batch_size", "schedule.lr", "seed"),
    *("split.val_fraction", "split.folds", "split.fold", "precision", "device", "results_dir", "dry_run"),
)


def help_page(composed: DictConfig, words: Sequence[str], config_dir: str | None) -> str:
    """The text of --help for a composed configuration: the groups and the first keys; with `words`, all keys."""
    keys = dict(described_keys(composed))
    parts = [composed.hydra.help.header]
    if words:
        parts += ["KEYS of this choice, with their values", *(_entry(key, says) for key, says in keys.items())]
    else:
        parts += ["GROUPS (delta-run help GROUP has a sentence for each choice)"]
        parts += [_entry(group, ", ".join(sentences(group, config_dir)), 12) for group in GROUPS]
        parts += ["", "KEYS (delta-run --help reg=delta dataset=cub has all keys of a choice)"]
        shown = {key: key.partition("=")[0] for key in keys}
        parts += [_entry(key, keys[key]) for first in FIRST_KEYS for key in keys if shown[key] == first]
    return "\n".join(parts) + "\n"


def show_choices(words: Sequence[str], config_dir: str | None) -> int:
    """Prints the choices of the group that `help GROUP` or `GROUP=?` names. Exit status 1: it is not a group."""
    group = next((word.removesuffix("=?") for word in words if word.endswith("=?")), words[-1])
    if group not in GROUPS_WITH_HELP:
        log.error(f"no group {group}{did_you_mean(group, GROUPS_WITH_HELP)} Groups: {', '.join(GROUPS_WITH_HELP)}")
        return 1
    found = sentences(group, config_dir)
    sys.stdout.write("".join(_entry(f"{group}={name}", says, 30) + "\n" for name, says in found.items()))
    return 0


def sentences(group: str, config_dir: str | None = None) -> dict[str, str]:
    """The choices of a group, and the sentence that describes each: choices with a file, and those without."""
    registered = REGISTRIES[group].entries if group in WITHOUT_FILE else {}
    found = {name: (entry.thing.__doc__ or entry.title).split("\n")[0] for name, entry in registered.items()}
    for name, file in choices(group, config_dir).items():
        comment = re.match(r"(?:#.*\n)*", file.read_text(encoding="utf-8"))
        lines = [line.removeprefix("#").strip() for line in comment[0].splitlines()] if comment else []
        text = " ".join(line for line in lines if not line.startswith(("delta-run ", "delta-pretrain", "@package")))
        found[name] = re.split(r"(?<=[.?])\s+(?=[A-Z]|root )", text)[0] or found.get(name, "")
    return dict(sorted(found.items()))


def described_keys(composed: DictConfig) -> Iterator[tuple[str, str]]:
    """Every key of a configuration with its value, as KEY=VALUE, and its description."""

    def entries(node: DictConfig, prefix: str) -> Iterator[tuple[str, str]]:
        group = group_of(node)
        says = {each.name: each.help for each in describe(group)} if group else {}
        for name in map(str, node if prefix else [name for name in node if name != "hydra"]):
            key, value = f"{prefix}{name}", "???" if OmegaConf.is_missing(node, name) else node[name]
            if isinstance(value, DictConfig) and (group_of(value) or key == "reg.terms"):
                yield from entries(value, f"{key}.")
            else:
                word = as_word(OmegaConf.to_object(value) if OmegaConf.is_config(value) else value)
                yield f"{key}={word}", says.get(name, "")  # a group that is null has none

    return entries(composed, "")


def _entry(name: str, says: str, column: int = 34) -> str:
    """A name and its description, side by side if there is room, in lines of at most WIDTH letters."""
    indent = " " * (column + 2)
    if len(name) < column or not says:
        return textwrap.fill(says, WIDTH, initial_indent=f"  {name:{column}}", subsequent_indent=indent) or f"  {name}"
    return f"  {name}\n" + textwrap.fill(says, WIDTH, initial_indent=indent, subsequent_indent=indent)
