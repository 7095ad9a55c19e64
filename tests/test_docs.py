"""What the documentation names is there, and what follows from the registries is up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from delta_transfer.common.options import describe
from delta_transfer.data import READERS
from delta_transfer.engine.callbacks import AVERAGES
from delta_transfer.engine.config import RunConfig
from delta_transfer.engine.optimizers import OPTIMIZERS
from delta_transfer.methods import METHODS

ROOT = Path(__file__).parent.parent
METHODS_PAGE = ROOT / "docs" / "methods.md"
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED)))
def test_tests_that_hold_a_promise_exist(file, test):
    assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text()


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> list[str]:
    """The page's lines without code blocks, tables, headings and long links."""
    text = re.sub(r"(?ms)^```.*?^```$", lambda block: "\n" * block[0].count("\n"), page.read_text())
    return ["" if line.startswith(("|", "!", "#")) or "](http" in line else line for line in text.splitlines()]


# A script writes that of the benchmarks.
PUBLISHED = [page for page in ROOT.glob("results/published/*/README.md") if page.parent.name != "benchmarks"]


@pytest.mark.parametrize("page", [*PAGES, *sorted(PUBLISHED)], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_prose_keeps_the_rules_of_language(page):
    """CONTRIBUTING.md, Language: at most 120 characters; no fragment with "Of", no "what is ... is"."""
    lines = prose(page)
    assert any(lines)
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []
    bent = re.compile(r"(?m)(?:^[-\d. ]*|[.:] )Of [a-z]|\b[Ww]hat is (?!\.\.\.)[^?.,:]{1,40} is ")
    assert bent.search("Of these two, one is left.") and bent.search("What is read again is checked.")
    assert [found[0] for found in bent.finditer("\n".join(lines))] == []


@pytest.fixture
def docs_registry(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import docs_registry

    return docs_registry


def test_the_page_of_methods_has_those_of_the_registry(docs_registry, request):
    made = docs_registry.with_methods_table(METHODS_PAGE.read_text())
    if request.config.getoption("--regenerate"):
        METHODS_PAGE.write_text(made)
    assert METHODS_PAGE.read_text() == made
    table = docs_registry.methods_table()
    assert all(f"| `{name}` | {entry.title} |" in table for name, entry in METHODS.entries.items())
    # The formulas stand there, written by hand.
    formulas = made.partition(docs_registry.END)[2]
    assert all(f"`{name}`" in formulas for name in METHODS)


def test_the_reference_has_every_method_and_every_key(docs_registry):
    page = docs_registry.reference((ROOT / "docs" / "reference.md").read_text())
    described = set(re.findall(r"^::: (delta_transfer\.\S+)$", page, re.M))
    assert {f"{entry.thing.__module__}.{entry.thing.__name__}" for entry in METHODS.entries.values()} <= described
    groups = {"": [RunConfig], "dataset.": [entry.options for entry in READERS.entries.values()]}
    for key, registry in (("optimizer.", OPTIMIZERS), ("average.", AVERAGES), ("reg.", METHODS)):
        groups[key] = [entry.options for entry in registry.entries.values()]
    wanted = {f"{key}{each.name}" for key, options in groups.items() for group in options for each in describe(group)}
    rows = set(re.findall(r"^\| `(\S+)` \| \S", page, re.M))  # with words beside the key
    assert wanted - rows == {"reg"}


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    """In a process of its own, as `make docs` does: MkDocs and its plugins import modules in another order."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "own_images.html", "reference.html", "published/table_quick/index.html"} <= set(pages)
    loaded = re.compile(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]* rel="stylesheet"[^>]*//')
    assert [name for name, page in pages.items() if loaded.search(page)] == []
    assert "sum_{b,c} C_l w_{l,c}" in pages["reference.html"]  # a docstring
    assert "strength of the penalty on the feature maps" in pages["reference.html"]  # an option
