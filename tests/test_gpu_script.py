"""scripts/gpu.py: what it runs, and that published records count as done. Nothing is trained."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "results/published/cub50_resnet50/records"


@pytest.fixture
def script(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "scripts/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    commands = []

    def run(*more: str, takes: float | None = 0) -> list[list[str]]:
        """The commands that it starts; each ends with the status `takes`, None: not in time."""
        monkeypatch.setattr(module, "within", lambda seconds, *command: commands.append([*map(str, command)]) or takes)
        words = ["--images", str(tmp_path / "birds"), "--weights", "w.pth", "--output", str(tmp_path / "out"), *more]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
        with pytest.raises(SystemExit):
            module.main()
        return commands

    return run


def test_the_final_runs_are_what_the_published_folds_chose_on_this_machines_paths(script, tmp_path):
    commands = script("--records", str(PUBLISHED), "--device", "cpu")
    sweeps = [command for command in commands if "delta_transfer.train" in command]
    finals = sweeps[-3:]
    chosen = {next(w for w in words if w.startswith("reg=")): words for words in finals}
    assert {reg: next(w for w in words if w.startswith("reg.alpha=")) for reg, words in chosen.items()} == {
        "reg=l2_sp": "reg.alpha=0.01",
        "reg=delta_noatt": "reg.alpha=0.0001",
        "reg=delta": "reg.alpha=0.0001",
    }
    for words in finals:
        assert f"dataset.root={tmp_path / 'birds'}" in words and "device=cpu" in words and "seed=range(5)" in words
        assert f"results_dir={tmp_path / 'out'}" in words and not any(word.startswith("split.") for word in words)
    assert len(sweeps) == 7  # three methods on folds, L2 and L2-FE, three final


def test_without_a_choice_it_goes_on_with_the_benchmarks(script, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    lines = (PUBLISHED / "records.jsonl").read_text().splitlines()
    only = [line for line in lines if json.loads(line)["config"]["reg"]["name"] == "l2_sp"]
    (few / "records.jsonl").write_text("\n".join(only))
    commands = script("--records", str(few))
    assert not any("seed=range(5)" in words and "reg=l2_sp" in words for words in commands)
    assert any(words[0].endswith("bench.py") for words in commands)
    assert "left for the same command: comparison" in capsys.readouterr().out


def test_what_is_not_done_in_time_is_said(script, capsys):
    commands = script(takes=None)
    assert sum("delta_transfer.train" in words for words in commands) == 1
    assert "left for the same command: comparison, benchmarks" in capsys.readouterr().out
