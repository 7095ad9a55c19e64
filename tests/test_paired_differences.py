import importlib.util
import sys
from pathlib import Path

import pytest

from .test_report import record, save

SCRIPT = Path(__file__).parent.parent / "scripts" / "paired_differences.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("paired_differences", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["paired_differences.py", *map(str, arguments)])
        module.main()

    return run


def test_across_folders(script, tmp_path, capsys):
    ours = save(tmp_path / "a", [record("delta", s, v) for s, v in [(0, 11.0), (1, 22.0), (2, 33.0), (9, 0.0)]])
    theirs = save(tmp_path / "b", [record("l2", s, v) for s, v in [(0, 10.0), (1, 20.0), (2, 30.0)]])
    script(ours, "delta", theirs, "l2")
    assert capsys.readouterr().out == (
        "delta - l2: +2.0 [-0.5, +4.5] (3) of +1.0, +2.0, +3.0; 95 % t interval\n"  # worked in test_statistics.py
    )


def test_two_runs_of_one_seed_are_refused(script, tmp_path):
    folder = save(tmp_path, [record("delta", 0, alpha=a) for a in (0.1, 1)] + [record("l2")])
    with pytest.raises(SystemExit, match="several runs of delta with one seed"):
        script(folder, "delta", "l2")
