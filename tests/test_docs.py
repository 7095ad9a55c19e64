"""What the documentation names is there."""

import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parent.parent
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED)))
def test_tests_that_hold_a_promise_exist(file, test):
    assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text()


def test_the_site_is_built_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "own_images.html", "reference.html", "published/table_quick/index.html"} <= set(pages)
    loaded = re.compile(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]* rel="stylesheet"[^>]*//')
    assert [name for name, page in pages.items() if loaded.search(page)] == []
    assert "how much the" in pages["reference.html"]  # a docstring
