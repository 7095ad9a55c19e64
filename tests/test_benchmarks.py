"""Every benchmark runs; what it measures is not tested."""

import importlib
import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from delta_transfer.experiment.lookup import Lookup

from .miniature import composed, delta_run

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


def test_rows_of_replayed_steps_are_in_the_table(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    bench, graphs = importlib.import_module("bench"), importlib.import_module("bench_compile")
    monkeypatch.setattr(graphs, "step_of", lambda *of, **options: lambda: sum(range(50_000)))
    monkeypatch.setattr(graphs, "PlainDelta", lambda *of: SimpleNamespace(step=lambda: sum(range(500_000))))
    rows = {}
    report = SimpleNamespace(add=lambda key, value, detail: rows.update({key: value}))
    graphs.add_graphs(report, "resnet50", 64, 224, 3, torch.device("cpu"))
    assert set(rows) == set(graphs.GRAPH_ROWS) and min(rows.values()) > 0 and rows["graph_plain"] > 2
    targets = {target.key: target for target in bench.TARGETS}
    assert len(targets) == len(bench.TARGETS) and set(rows) <= set(targets)
    bounded = {key: targets[key].cuda for key in rows if targets[key].cuda}
    assert bounded == {"graph_l2_sp_to_l2": 1.03, "graph_delta_to_l2": 1.25, "graph_rate": 5000, "graph_plain": 3}


def test_memory_of_replayed_steps_has_a_row_beside_that_of_launched_ones(monkeypatch, capsys):
    """Each method in its own process, which is this one here."""
    monkeypatch.syspath_prepend(SCRIPTS)
    bench, memory = importlib.import_module("bench"), importlib.import_module("bench_memory")
    rows, seen, steps = {}, [], []

    def in_this_process(command, **options):
        exec(command[2])
        return SimpleNamespace(stdout={"l2": "4", "delta": "5"}[seen[-1][0]])

    report = SimpleNamespace(add=lambda key, value, detail: rows.update({key: value}), write=list)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "Report", lambda options: report)
        patch.setattr(memory, "arguments", lambda _: SimpleNamespace(device=torch.device("cuda"), quick=False))
        patch.setattr(memory, "print_memory", lambda *of: seen.append(of))
        patch.setattr(memory.subprocess, "run", in_this_process)
        memory.main()
    assert rows == {"memory_delta": 1.25, "memory_delta_replayed": 1.25}
    assert {target.key: target.cuda for target in bench.TARGETS if target.key in rows} == rows
    assert seen == [
        (method, "resnet50", 64, 224, "cuda", again) for again in (False, True) for method in ("l2", "delta")
    ]
    monkeypatch.setattr(memory, "step_of", lambda *of, step: lambda: steps.append(step))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    memory.print_memory("l2", "resnet50", 2, 32, "cpu", True)
    assert [type(step) for step in steps] == 4 * [memory.GraphedStep] and capsys.readouterr().out.split()[-1] == "7"


@pytest.mark.slow
def test_copies_of_a_finished_run_are_finished(tmp_path, monkeypatch):
    """The benchmark of finished runs skips all of them: each copy has the name that its own run would have."""
    monkeypatch.syspath_prepend(SCRIPTS)
    startup = importlib.import_module("bench_startup")
    monkeypatch.setattr(startup, "best_of", lambda times, command, *words: delta_run(monkeypatch, *words))
    words = startup.write_finished(str(tmp_path), 3)
    lookup = Lookup()
    assert all(lookup.finished(composed(*words, f"seed={seed}")) for seed in range(3))
    assert lookup.finished(composed(*words, "seed=3")) is None
