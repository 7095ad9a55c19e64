"""Each spread, interval and difference on these pages is what a command prints from the published records.

A page of results/published/ is compared with what its own commands print, README.md and docs/ with what all of them
and those of docs/choose.md print. Commands that train are not among them.
"""

import contextlib
import io
import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest

from delta_transfer.report import main as delta_report

ROOT = Path(__file__).parent.parent
PUBLISHED = sorted(
    page for page in (ROOT / "results/published").glob("*/README.md") if page.parent.name != "benchmarks"
)
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("choose.md", "results.md", "first_run.md"))]
SCRIPTS = r"(?:read_study|read_curves|paired_differences|attention_study)\.py(?: --read --results)?"
READING = rf"(?:delta-report|python scripts/{SCRIPTS}) +results/published"
# Nobody can compute these again: the weights, or the predictions, of their runs are not published.
WITHOUT_RECORDS = ("## Do unused channels come to life?", "### From predictions that are not published")

NUMBER = r"[-+]?\d+\.\d+"
CLAIM = re.compile(rf"{NUMBER} \[{NUMBER}, {NUMBER}\]|\d+\.\d+ ± \d+\.\d+|[-+]\d+\.\d+ to [-+]\d+\.\d+")


def claims(text: str) -> set[str]:
    """As commands print them: a rounded zero has no sign, and an interval has brackets."""
    found = {re.sub(r"[-+](0\.0)(?!\d)", r"\1", claim) for claim in CLAIM.findall(" ".join(text.split()))}
    return {re.sub(r"^(\S+) to (\S+)$", r"[\1, \2]", claim) for claim in found}


def sections(page: Path, without_records: bool = False) -> str:
    parts = re.split(r"(?m)^(?=##)", page.read_text(encoding="utf-8"))
    return "".join(part for part in parts if part.startswith(WITHOUT_RECORDS) is without_records)


def commands(page: Path) -> list[str]:
    """Those of its code blocks that read published records; figures are left out."""
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```$", page.read_text(encoding="utf-8"))
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"--figures? \S+", "", line) for line in lines if re.match(READING, line)]


@cache
def printed(command: str) -> str:
    words = [
        str(path)
        for word in shlex.split(command, comments=True)
        for path in (sorted(Path().glob(word)) if "*" in word else [word])
    ]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        if words[0] == "delta-report":
            assert delta_report(words[1:]) == 0, command
        else:
            patch.syspath_prepend("scripts")
            patch.setattr("sys.argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
    return output.getvalue()


@pytest.mark.parametrize("page", [*PUBLISHED, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_command_prints_each_claim_from_records(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    sources = [page] if page in PUBLISHED else [*PUBLISHED, ROOT / "docs/choose.md"]
    output = "".join(printed(command) for source in sources for command in commands(source))
    output += "".join(sections(each, without_records=True) for each in PUBLISHED)
    assert output
    assert sorted(claim for claim in claims(sections(page)) if claim not in output) == []


def test_claims_are_found():
    assert claims("+1.5 [+0.5,\n+2.5] (5), -0.0 [-0.4, +0.0]; 3.0 behind (-3.8 to -2.2); 52.2 ± 0.5") == {
        "+1.5 [+0.5, +2.5]",
        "0.0 [-0.4, 0.0]",
        "[-3.8, -2.2]",
        "52.2 ± 0.5",
    }
