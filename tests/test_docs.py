"""What the documentation names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED)))
def test_tests_that_hold_a_promise_exist(file, test):
    assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text()
