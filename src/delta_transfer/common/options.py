"""Options: typed, described and checked values, declared beside the code that they configure.

    @dataclass
    class EMAConfig(AverageConfig):
        decay: float = option(0.999, "decay rate of the average", at_least=0, below=1)

A group of options is a dataclass. Each field has a description of one line, which the reference page, `--help` and
error messages show. Nothing here imports torch, Hydra or OmegaConf.
"""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, NamedTuple, NoReturn, Self, TypeVar

from .errors import UserError

MISSING: Any = "???"  # the value of an option that has to be given; OmegaConf uses the same mark
LARGEST_SIDE = 2**14  # pixels
LARGEST_BATCH = 2**20  # images of a batch or of a drawn class
LONGEST = 10**9  # iterations, epochs, images

T = TypeVar("T")


class OptionError(UserError):
    """A value that an option cannot have. key: the option's name on the command line, such as reg.alpha."""

    def __init__(self, key: str, message: str):
        super().__init__(key, message)  # all arguments, so that it can be pickled
        self.key, self.message = key, message

    def __str__(self) -> str:
        return self.message


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: Sequence[Any] = (),
    identity: bool = True,
) -> Any:
    """A field of a group of options.

    Args:
        default: the value, or a group of options or a function that makes one. Lists and dicts are copied.
        help: a description of one line, with the unit.
        above, at_least, below, at_most: bounds of a number, and of each number in a list. They allow None if the
            field's type does.
        choices: the only values allowed.
        identity: whether another value makes another run. False for options that decide where and how a run is made
            but do not change its result.
    """
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    metadata = {"help": help, "bounds": bounds, "choices": tuple(choices), "identity": identity}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


class Options:
    """Base of every group of options. A subclass is a dataclass and extends `check` for rules about several fields.

    key: the group's name on the command line. version: raise it when a default or the meaning of a value changes; it is
    part of a run's identity.
    """

    key: ClassVar[str] = ""
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            _check_value(f"{self.key}.{entry.name}" if self.key else entry.name, getattr(self, entry.name), entry)
        self.check()

    def check(self) -> None:
        """Raises OptionError if values do not go together."""

    def require(self, condition: bool, name: str, message: str) -> None:
        """Raises OptionError about the field `name` unless `condition` holds."""
        if not condition:
            raise OptionError(f"{self.key}.{name}" if self.key else name, message)

    def replace(self, **changes: Any) -> Self:
        """A checked copy with other values."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def _check_value(key: str, value: Any, entry: "dataclasses.Field[Any]") -> None:
    """Raises OptionError, with the option's description, for a value that is not a choice or out of bounds."""
    if value is None or value == MISSING or not entry.metadata:
        return

    def refuse(rule: str, wrong: object) -> NoReturn:
        raise OptionError(key, f"{key} {rule}, got {wrong!r} ({entry.metadata['help']}).")

    choices = entry.metadata["choices"]
    if choices and value not in choices:
        refuse(f"must be one of {', '.join(map(str, choices))}", value)
    for number in value if isinstance(value, list | tuple) else [value]:
        if rule := _broken_rule(number, entry.metadata["bounds"]):
            refuse(rule, number)


BOUNDS: dict[str, tuple[str, str, Callable[[float, float], bool]]] = {
    "above": (">", "more than", operator.gt),
    "at_least": (">=", "at least", operator.ge),
    "below": ("<", "less than", operator.lt),
    "at_most": ("<=", "at most", operator.le),
}


def _broken_rule(value: object, bounds: Mapping[str, float]) -> str | None:
    """The rule that a number breaks, in words; None if it breaks none or is not a number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    for name, bound in bounds.items():
        _, words, holds = BOUNDS[name]
        if not holds(value, bound):
            return f"must be {words} {bound:,}"
    # PyTorch cannot represent other numbers: integers beyond 64 bits, floating-point numbers beyond 32.
    representable = abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value) and abs(value) <= 3e38
    return None if representable else "is out of range"


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "None": "null",
    "list[str]": "a list [a,b]",
    "list[float]": "a list of numbers [0.1,0.2]",
    "list[int]": "a list of whole numbers [1,2]",
}


class Description(NamedTuple):
    """An option in words, for the reference and for help."""

    name: str  # with dots in nested groups: attention.method
    help: str
    kind: str  # the type as it is written in Python; "" for any
    default: str  # as on a command line; "" for an option that has to be given
    allowed: str  # bounds or choices; "" for any value of the type

    @property
    def is_text(self) -> bool:
        """Whether it takes any text, such as a path."""
        return self.kind in ("str", "str | None") and not self.allowed

    @property
    def in_words(self) -> str:
        """The values that it takes."""
        words = " or ".join(_KINDS.get(kind, kind) for kind in self.kind.split(" | "))
        return f"{words}, {self.allowed}" if self.allowed else words


def describe(group: type[Options]) -> Iterator[Description]:
    """Each option of `group`, in order. A nested group is replaced by its options."""
    hints = typing.get_type_hints(group)
    for entry in fields(group):  # type: ignore[arg-type]
        hint = hints[entry.name]
        if nested := _group_in(hint):
            yield from (each._replace(name=f"{entry.name}.{each.name}") for each in describe(nested))
            continue
        default = default_of(entry)
        yield Description(
            entry.name,
            entry.metadata.get("help", ""),
            "" if hint is Any else hint.__name__ if isinstance(hint, type) else str(hint),
            "" if default is dataclasses.MISSING or default == MISSING else as_word(default),
            _allowed(entry.metadata),
        )


def default_of(entry: "dataclasses.Field[Any]") -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def as_word(value: Any) -> str:
    """A value as it is written on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{','.join(map(as_word, value))}]"
    return str(value) or "''"


def _allowed(metadata: Mapping[str, Any]) -> str:
    if metadata.get("choices"):
        return ", ".join(map(as_word, metadata["choices"]))
    return ", ".join(f"{BOUNDS[name][0]} {as_word(bound)}" for name, bound in metadata.get("bounds", {}).items())


def from_mapping(group: type[T], values: Mapping[str, Any]) -> T:
    """The checked options from `values`, plain data such as a record's configuration.

    Raises OptionError for a name that the group does not have and for an option without a value.
    """
    key = getattr(group, "key", "")
    hints, known = typing.get_type_hints(group), {entry.name: entry for entry in fields(group)}  # type: ignore[arg-type]
    if unknown := values.keys() - known.keys():
        raise OptionError(key, f"{key or 'configuration'} has no {', '.join(sorted(unknown))}.")
    made = {}
    for name, value in values.items():
        nested = _group_in(hints[name])
        if nested and isinstance(value, Mapping):
            value = from_mapping(nested, value)
        elif not _has_type(value, hints[name]):
            raise OptionError(f"{key}.{name}", f"{key}.{name} has a value of another type: {value!r}.")
        made[name] = _as_float(value, hints[name])
    for name, entry in known.items():
        if made.get(name, entry.default) == MISSING:
            raise OptionError(f"{key}.{name}", f"{key}.{name} has no value.")
    return group(**made)


def _has_type(value: Any, hint: Any) -> bool:
    """Whether plain data, such as JSON, fits a field's type."""
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) in (list, dict):
        kinds = typing.get_args(hint)
        values = list(value.values()) if isinstance(value, dict) else value
        return isinstance(value, typing.get_origin(hint)) and all(_has_type(one, kinds[-1]) for one in values)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def _as_float(value: Any, hint: Any) -> Any:
    """Turns whole numbers in a field of floating-point numbers into these: 1 and 1.0 are one setting and identity."""
    if isinstance(value, list) and typing.get_origin(hint) is list:
        return [_as_float(one, typing.get_args(hint)[0]) for one in value]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and float in kinds and int not in kinds else value


def _group_in(hint: Any) -> type[Options] | None:
    """The group of options that a field holds, if it holds one."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Options)), None)


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A named thing of a registry: the thing, the title in reports, and its options."""

    name: str
    thing: T
    title: str
    options: type[Options]


class Registry(Generic[T]):
    """Things by their names in a configuration key. Each registers itself with a decorator in its own file."""

    def __init__(self, key: str, options_of: Callable[[T], type[Options]] = lambda thing: Options):
        self.key = key  # the configuration key that names one, such as reg.name
        self.options_of = options_of  # gives the options of things that declare them themselves
        self.entries: dict[str, Entry[T]] = {}

    def register(self, name: str, title: str, options: type[Options] | None = None) -> Callable[[T], T]:
        """A decorator that makes a thing known as `name`. Raises ValueError for a name that is taken."""

        def add(thing: T) -> T:
            if name in self.entries:
                raise ValueError(f"{self.key}={name} is registered twice.")
            self.entries[name] = Entry(name, thing, title, options or self.options_of(thing))
            return thing

        return add

    def __getitem__(self, name: str) -> Entry[T]:
        """Raises OptionError for a name that nothing has."""
        if name not in self.entries:
            raise OptionError(self.key, f"{self.key}={name}: there is only {', '.join(sorted(self.entries))}.")
        return self.entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)
