"""Imports of the server that forks the processes of tests/children.py, so that each child has them at once.

That are all imports, and the usual choices as Hydra composes them. Nothing is computed with torch: threads would be
lost in a fork.
"""

from pathlib import Path

import pytest

from delta_transfer.methods import DELTA, METHODS
from delta_transfer.methods.base import config_of

from . import children
from .learned import Learned
from .miniature import composed, tiny_overrides
from .quick_hydra import compose_each_choice_once, skip_second_compositions

assert children
METHODS.register("learned", "Learned", config_of(DELTA))(Learned)
patch = pytest.MonkeyPatch()  # for as long as the server is there
compose_each_choice_once(patch)
skip_second_compositions(patch)
for choices in (["reg=l2"], ["reg=delta", "average=ema"], ["reg=afa"]):
    composed(*tiny_overrides(Path(), Path()), *choices)
