"""Methods by name. A new one is a file here, which registers itself, and a YAML in conf/reg/."""

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ..common.options import OptionError, from_mapping
from .base import METHODS, MethodConfig, Regularizer
from .sum import Sum, SumConfig, about_term

for _module in iter_modules(__path__):
    if not _module.ispkg:
        import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Regularizer", "build_method", "method_config", "title_of"]
__all__ += sorted({entry.thing.__name__ for entry in METHODS.entries.values()})


def __getattr__(name: str) -> Any:
    """The registered classes are attributes of this package."""
    for entry in METHODS.entries.values():
        if entry.thing.__name__ == name:
            return entry.thing
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build_method(config: MethodConfig) -> Regularizer:
    """The method that checked options describe.

    Raises OptionError for a name that no method has, and for options of another method than the one that is named.
    """
    options = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name != "name"}
    if isinstance(config, SumConfig):  # whatever its name, which tells its terms
        terms = {}
        for name, term in config.terms.items():
            with about_term(name):
                terms[name] = build_method(term)
        return Sum(**options | {"terms": terms})
    method = METHODS[config.name]
    if not isinstance(config, method.options):
        raise OptionError(
            METHODS.key,
            f"reg.name={config.name} does not take the options of this file of conf/reg: choose a method by "
            f"reg={config.name}, or write /schema/reg@_here_: {config.name} in yours.",
        )
    return method.thing(**options)


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


def title_of(config: MethodConfig) -> str:
    """How reports write a method's name. A sum's is made of its terms' titles."""
    if isinstance(config, SumConfig):
        return "+".join(title_of(term) for term in config.terms.values())
    return METHODS[config.name].title
