"""Every benchmark runs; what it measures is not tested."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


# bench_compile.py spends a minute in the compiler; compile=true has a test of its own (test_training.py).
@pytest.mark.parametrize("script", sorted({path.name for path in SCRIPTS.glob("bench_*.py")} - {"bench_compile.py"}))
def test_benchmark_measures_something(script, tmp_path):
    output = tmp_path / "measured" / "rows.json"
    command = [sys.executable, SCRIPTS / script, "--quick", "--device", "cpu", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert rows
    for key, row in rows.items():
        assert key in done.stdout and row["detail"]
        # None: the detail says why it cannot be measured here.
        assert row["value"] is None or (math.isfinite(row["value"]) and row["value"] > 0), key
