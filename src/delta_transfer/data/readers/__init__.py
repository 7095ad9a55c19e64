"""Readers, each in a file of its own. Importing this package registers all of them and the embedded data sets."""

from importlib import import_module
from pkgutil import iter_modules

from .. import embedded

for _package in (__name__, embedded.__name__):
    for _module in iter_modules(import_module(_package).__path__):
        import_module(f"{_package}.{_module.name}")
