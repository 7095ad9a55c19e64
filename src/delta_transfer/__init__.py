"""Transfer learning with DELTA and its relatives: a run is one dataset, backbone, reg and schedule."""

from importlib.metadata import version

__version__ = version("delta-transfer")
