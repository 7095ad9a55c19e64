"""Methods by name. A new one is a file here, which registers itself, and a YAML in conf/reg/."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ..common.options import from_mapping
from .base import METHODS, MethodConfig, Regularizer
from .sum import SumConfig, about_term

for _module in iter_modules(__path__):
    if not _module.ispkg:
        import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "MethodConfig", "Regularizer", "method_config"]
__all__ += sorted({entry.thing.__name__ for entry in METHODS.entries.values()})


def __getattr__(name: str) -> Any:
    """The registered classes are attributes of this package."""
    for entry in METHODS.entries.values():
        if entry.thing.__name__ == name:
            return entry.thing
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def method_config(values: Mapping[str, Any]) -> MethodConfig:
    """The checked options that `values`, such as the `reg` of a record's configuration, stand for."""
    if "terms" in values:
        terms = {}
        for name, term in values["terms"].items():
            with about_term(name):
                terms[name] = method_config(term)
        return from_mapping(SumConfig, {**values, "terms": terms})
    options = METHODS[values["name"]].options
    assert issubclass(options, MethodConfig)
    return from_mapping(options, values)
