"""Parts of the documentation that follow from the registries: the table of methods, and the reference.

Every build of the site makes the reference. `pytest tests/test_docs.py --regenerate` makes the table in
docs/methods.md; without the option the test compares it.
"""

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path

from delta_transfer.common.options import Options, Registry, describe
from delta_transfer.common.style import method_order
from delta_transfer.data import READERS
from delta_transfer.engine.callbacks import AVERAGES
from delta_transfer.engine.config import RunConfig
from delta_transfer.engine.optimizers import OPTIMIZERS
from delta_transfer.methods import METHODS
from delta_transfer.methods.base import MethodConfig, Regularizer

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- methods: made by scripts/docs_registry.py -->", "<!-- end of methods -->"


def methods_table() -> str:
    """The table of docs/methods.md, in the order of the reports' columns."""
    rows = ["| `reg=` | method | in Python | strengths by default | formula and source |", "|---|---|---|---|---|"]
    for name in sorted(METHODS, key=method_order):
        entry = METHODS[name]
        file = Path(inspect.getfile(entry.thing)).relative_to(ROOT).as_posix()
        cells = f"`{name}`", entry.title, f"`{entry.thing.__name__}`", _strengths(entry.options)
        rows.append(f"| {' | '.join(cells)} | [{Path(file).name}](../{file}) |")
    return "\n".join(rows) + "\n"


def with_methods_table(page: str) -> str:
    """The page with the current table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"The page has no place for the table of methods: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{methods_table()}{END}{after}"


def reference(page: str) -> str:
    """docs/reference.md with its marks replaced by the contents of the registries."""
    return page.replace("<!-- methods -->", "\n".join(_methods())).replace("<!-- keys -->", "\n".join(_keys()))


def _methods() -> Iterator[str]:
    """Each method's class, whose docstring has the formula, and the keys of its options."""
    by_class: dict[type, list[str]] = {}
    for name in sorted(METHODS, key=method_order):
        by_class.setdefault(METHODS[name].thing, []).append(name)
    for method, names in by_class.items():
        yield f"::: {method.__module__}.{method.__name__}\n    options: {{show_signature: false}}\n"
        yield f"```python\n{method.__name__}({', '.join(_arguments(method))})\n```\n"
        yield f"{' and '.join(f'`reg={name}`' for name in names)}:\n"
        yield _table("reg.", METHODS[names[0]].options, without=["name"])


def _arguments(method: type[Regularizer]) -> Iterator[str]:
    """Each argument of the constructor with its default."""
    factories = {entry.name: entry.default_factory for entry in fields(method)}
    for name, argument in inspect.signature(method).parameters.items():
        if argument.default is argument.empty:
            yield name
            continue
        made = factories.get(name, MISSING)
        value = argument.default if made is MISSING else made()
        yield f"{name}={type(value).__name__}()" if isinstance(value, Options) else f"{name}={value!r}"


def _keys() -> Iterator[str]:
    """The keys of every group."""
    groups = _nested(RunConfig)
    yield "### Of the whole run\n"
    yield _table("", RunConfig, without=[*groups, "reg"])
    for group, registry, key in (
        ("dataset", READERS, "dataset.reader"),
        ("optimizer", OPTIMIZERS, "optimizer"),
        ("average", AVERAGES, "average"),
    ):
        yield f"### `{group}`\n"
        yield _table(f"{group}.", groups[group])
        yield from _registered(group, registry, key, without=[each.name for each in describe(groups[group])])
    yield "### `reg`\n"
    yield _table("reg.", MethodConfig)
    yield "The other keys of a method stand with [the method](#methods).\n"
    for group in ("backbone", "schedule", "split", "evaluate", "arcface"):
        yield f"### `{group}`\n"
        yield _table(f"{group}.", groups[group])


def _registered(group: str, registry: Registry, key: str, without: list[str]) -> Iterator[str]:
    """The own keys of each entry of a registry; then the entries without own keys."""
    plain = []
    for name, entry in sorted(registry.entries.items()):
        if all(each.name in without for each in describe(entry.options)):
            plain.append(f"`{key}={name}`")
        else:
            yield f"`{key}={name}` ({entry.title}) also has:\n"
            yield _table(f"{group}.", entry.options, without)
    if plain:
        yield f"Without keys of their own: {', '.join(plain)}.\n"


def _nested(group: type[Options]) -> dict[str, type[Options]]:
    """The groups that `group` holds, by their keys."""
    kinds = inspect.get_annotations(group, eval_str=True)
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Options)}


def _table(prefix: str, group: type[Options], without: Iterable[str] = ()) -> str:
    """One row for each key of `group`. without: names of keys, or of nested groups, that are left out."""
    rows = ["| key | what it is | type | allowed | default |", "|---|---|---|---|---|"]
    for each in describe(group):
        if each.name not in without and each.name.split(".")[0] not in without:
            cells = (
                f"`{prefix}{each.name}`",
                _escaped(each.help),
                *map(_code, (each.kind, each.allowed, each.default)),
            )
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _strengths(options: type[Options]) -> str:
    kept = ("alpha", "beta", "weight_decay")
    return ", ".join(f"{each.name} {each.default}" for each in describe(options) if each.name in kept)


def _code(text: str) -> str:
    return f"`{_escaped(text)}`" if text else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
