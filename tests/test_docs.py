"""What the documentation names is there."""

import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from delta_transfer import config
from delta_transfer.methods import REGULARIZERS

ROOT = Path(__file__).parent.parent
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED)))
def test_tests_that_hold_a_promise_exist(file, test):
    assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text()


def test_the_reference_has_every_method_and_every_key():
    keys = {name for name, value in vars(config).items() if isinstance(value, type) and is_dataclass(value)}
    keys -= {"PairsConfig", "OfficialCounts"}  # what LFWConfig and GlyphPairsConfig share; what decides nothing
    wanted = {f"regularizers.{method.__name__}" for method in REGULARIZERS.values()} | {f"config.{key}" for key in keys}
    described = re.findall(r"^::: delta_transfer\.(\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.M)
    assert wanted - set(described) == set()


def test_the_site_is_built_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "own_images.html", "reference.html", "published/table_quick/index.html"} <= set(pages)
    loaded = re.compile(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]* rel="stylesheet"[^>]*//')
    assert [name for name, page in pages.items() if loaded.search(page)] == []
    assert "how much the" in pages["reference.html"]  # a docstring
