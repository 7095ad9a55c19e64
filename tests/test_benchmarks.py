"""Every benchmark runs; what it measures is not tested."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks set their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# bench_compile.py spends a minute in the compiler; compile=true has a test of its own (test_training.py).
OTHERS = sorted({path.name for path in SCRIPTS.glob("bench_*.py")} - {"bench_compile.py", "bench_evaluation.py"})


@pytest.mark.parametrize(
    "script", ["bench_evaluation.py", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_benchmark_measures_something(script, tmp_path, monkeypatch, capsys):
    """In this process: importing torch for each would take most of the time."""
    output = tmp_path / "measured" / "rows.json"
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", [script, "--quick", "--device", "cpu", "--output", str(output)])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    rows, printed = json.loads(output.read_text())["rows"], capsys.readouterr().out
    assert rows
    for key, row in rows.items():
        assert key in printed and row["detail"]
        # None: the detail says why it cannot be measured here.
        assert row["value"] is None or (math.isfinite(row["value"]) and row["value"] > 0), key
