"""A comparison that ends in time: its levels, their estimates and the plan that a command keeps."""

import json
import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest

from delta_transfer.cli import which_is_best
from delta_transfer.cli.which_is_best import compare_methods, levels_for
from delta_transfer.common.errors import UserError
from delta_transfer.data import load_dataset
from delta_transfer.experiment import budget, planning
from delta_transfer.experiment.budget import LEVELS, PRESETS, Estimate, Level, dearest_within
from delta_transfer.experiment.costs import Cost, seconds_beside_steps, seconds_of_decoding
from delta_transfer.experiment.lookup import Lookup
from delta_transfer.models.taps import Network

from .miniature import composed, delta_run
from .test_report import record
from .test_selection import cross_validated
from .trees import write_folder

MINUTE = 60.0
TINY = Level(96, 100, 2, 1, ("l2", "l2_fe"), ("resnet18",))


def lasting(seconds: float) -> Estimate:
    return Estimate(before=0.0, on_folds=seconds, final={"resnet18": {"l2": 0.0}})


# --- Levels ---


def test_no_level_is_smaller_than_the_one_before():
    for cheaper, dearer in zip(LEVELS, LEVELS[1:], strict=False):
        for name, least in vars(cheaper).items():
            more = getattr(dearer, name)
            if isinstance(more, tuple):
                assert {*least} <= {*more}
            else:
                assert (more or 10**6) >= (least or 10**6)
    assert list(PRESETS.values()) == sorted(PRESETS.values())


@pytest.mark.parametrize(
    ("text", "seconds"), [("45m", 2700), ("45min", 2700), ("2h", 7200), ("1h30m", 5400), ("90s", 90), ("1d", 86400)]
)
def test_times(text, seconds):
    assert budget.seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["45", "", "m", "0m", "-5m", "1.5h", "5 m", "99999d", "10x", "30m1h"])
def test_what_is_no_time(text):
    with pytest.raises(UserError, match="budget="):
        budget.seconds_in(text)


def test_the_dearest_level_that_fits_is_taken():
    times = dict(zip(LEVELS, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512], strict=True))
    seen = []

    def estimate_of(level):
        seen.append(level)
        return lasting(times[level] * MINUTE)

    level, found, more = dearest_within(list(LEVELS), lambda: 20 * MINUTE, estimate_of)
    assert level == LEVELS[4] and found.total == 16 * MINUTE and seen == list(LEVELS[:6])
    asked = re.search(r"budget=(\w+)", more)[1]
    assert dearest_within(list(LEVELS), lambda: budget.seconds_in(asked), estimate_of)[0] == LEVELS[5]
    # A tenth stays free: 16 of 17 minutes is too much.
    assert dearest_within(list(LEVELS), lambda: 17 * MINUTE, estimate_of)[0] == LEVELS[3]
    assert "budget=" not in dearest_within(list(LEVELS), lambda: 10**6, estimate_of)[2]


def test_a_budget_too_small_for_anything_is_refused_with_one_that_suffices():
    with pytest.raises(UserError, match=r"budget=\d+m") as refused:
        dearest_within([TINY], lambda: 5 * MINUTE, lambda level: lasting(10 * MINUTE))
    asked = budget.seconds_in(re.search(r"budget=(\w+)", str(refused.value))[1])
    assert dearest_within([TINY], lambda: asked, lambda level: lasting(10 * MINUTE))[0] == TINY


def test_what_the_command_says_itself_stays():
    asked = {"backbone": ["resnet34"], "reg": ["delta"], "seed": ["7", "8"], "split.folds": ["4"]}
    words = ["schedule.iterations=50", "backbone.resize=99"]
    only = Level(None, None, 4, 2, ("l2", "delta"), ("resnet34",), own_length=True)
    assert levels_for({"budget": "5m"}, words, asked) == [only]
    assert levels_for({"preset": "best"}, words, asked) == [only]
    assert levels_for({"budget": "5m"}, [*words, "schedule.batch_size=4"], asked) == [replace(only, own_length=False)]
    sizes = [level.image_size for level in levels_for({"budget": "5m"}, ["schedule=quick"], {})]
    assert sizes == sorted(sizes, key=lambda size: size or 10**6) and len({*sizes}) == 4
    assert levels_for({"preset": "good"}, [], {}) == [LEVELS[PRESETS["good"]]]


@pytest.mark.parametrize(
    ("limits", "words", "key"),
    [
        ({"budget": "5m", "preset": "good"}, [], "budget="),
        ({"preset": "fast"}, [], "quick, good, best"),
        ({"budget": "soon"}, [], "budget=soon"),
        ({"budget": "5m"}, ["hydra/launcher=joblib"], "hydra/launcher"),
    ],
)
def test_what_is_refused(limits, words, key):
    with pytest.raises(UserError, match=key):
        levels_for(limits, words, {})


@pytest.mark.parametrize("word", ["budget=5m", "preset=good", "+budget=5m"])
def test_other_commands_have_neither(word, monkeypatch, capsys):
    assert delta_run(monkeypatch, word, "dry_run=true") == 1
    assert "only +experiment=which_is_best" in capsys.readouterr().err


# --- What a level sets and takes ---


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images") / "photos", ants=10, bees=10)


composed_once = cache(composed)


@pytest.fixture(scope="module")
def small(photos):
    return composed_once("dataset=folder", f"dataset.root={photos}", "backbone=small_resnet", "backbone.weights=none")


@pytest.fixture(scope="module")
def config(photos):
    return composed_once("dataset=folder", f"dataset.root={photos}", "backbone=resnet18", "reg=l2", "device=cpu")


def test_a_level_sets_the_size_and_the_length(config, monkeypatch):
    assert budget.settings(TINY, config, 500) == {
        "backbone.image_size": 96,
        "backbone.resize": 110,
        "schedule.iterations": 100,
        "schedule.batch_size": 32,
    }
    assert budget.settings(TINY, config, 16)["schedule.batch_size"] == 8  # as schedule.iterations=auto
    unset = replace(TINY, image_size=None, iterations=None)
    assert budget.settings(unset, config, 500) == {}
    # Fewer iterations take less time: batches stay as small as the level's.
    assert budget.settings(replace(unset, own_length=True), config, 16) == {"schedule.batch_size": 8}

    def refuse(*_, **__):
        raise UserError("images of 96 x 96 pixels cannot pass")

    monkeypatch.setattr(Network, "map_shapes", refuse)  # as a ViT of one size does
    assert "backbone.image_size" not in budget.settings(TINY, config, 500)
    changed = budget.with_settings(config, {"schedule.iterations": 7, "backbone.resize": 300})
    assert (changed.schedule.iterations, changed.backbone.resize, config.backbone.resize) == (7, 300, 256)


def test_an_estimate_is_counts_times_measured_times(small, monkeypatch):
    cost = Cost(step_seconds=2.0, view_seconds=0.1, fit_seconds=(0.5, 3.0), memory_bytes=1, weights_bytes=1)
    monkeypatch.setattr(planning, "measure", lambda *_: cost)
    monkeypatch.setattr(budget, "seconds_of_decoding", lambda *_: 0.2)
    level = Level(None, None, 4, 3, ("l2", "delta"), ("resnet18",))
    config = budget.with_settings(small, {"schedule.iterations": 10})
    dataset = load_dataset(config.dataset, None)
    configs = {("resnet18", method): config for method in level.methods}
    plan = planning.Plan()
    found = budget.estimate(level, dataset, configs, {"delta": 5}, {"resnet18": 1.0}, plan)
    # 20 images, 4 of them for the test: a fold holds 4 out and trains on 12.
    fold, final = 10 * 2 + 4 * 0.1 + 1, 10 * 2 + 4 * 0.1 + 1
    assert found.before == pytest.approx(20 * 0.2)
    assert found.on_folds == pytest.approx((4 + 4 * 5) * fold + 2 * 4 * (12 * 0.5 + 3))
    assert found.final["resnet18"]["delta"] == pytest.approx(3 * final + 16 * 0.5 + 3)
    both = 2 * found.final["resnet18"]["l2"]
    assert found.total == found.of("resnet18", "delta") == pytest.approx(found.before + found.on_folds + both)
    assert found.of("resnet18", "l2") == pytest.approx(found.before + found.on_folds + both / 2)


def test_what_is_beside_the_steps_is_measured(small):
    assert 0 < seconds_beside_steps(small) < 60
    assert 0 < seconds_of_decoding(load_dataset(small.dataset, None), 32, "squash") < 5


# --- The command ---


@pytest.fixture
def command(photos, tmp_path, monkeypatch):
    """Carries out a command with made-up measurements and runs; returns its sentences and the words of its sweeps."""
    steps = []

    def measure(config, *_):
        steps.append(config.backbone.image_size)
        seconds = config.backbone.image_size / 100
        return Cost(step_seconds=seconds, view_seconds=0.0, fit_seconds=(0, 0), memory_bytes=1, weights_bytes=1)

    monkeypatch.setattr(planning, "measure", measure)
    monkeypatch.setattr(budget, "seconds_of_decoding", lambda *_: 0.0)
    monkeypatch.setattr(which_is_best, "seconds_beside_steps", lambda config: 0.0)
    given = ["dataset=folder", f"dataset.root={photos}", f"results_dir={tmp_path}", "backbone=resnet18", "reg=l2,l2_fe"]

    def run(*words, state="done"):
        sweeps, steps[:] = [], []

        def sweep(asked):
            sweeps.append(asked)
            method = next(word for word in asked if word.startswith("reg=")).removeprefix("reg=")
            if "split.folds=null" in asked:
                return [(state, record(method, seed, 80.0 + seed, run_id=f"{method}{seed}")) for seed in (0, 1)]
            return [(state, run) for run in cross_validated(method, 0.1, [80.0, 81.0])]

        def compose_first_job(asked):
            return composed_once(*asked), {"reg": "l2,l2_sp", "seed": "range(3)", "split.folds": "3"}

        return compare_methods([*given, *words], compose_first_job, sweep, Lookup()), sweeps, list(steps)

    return run


def test_a_plan_is_kept_for_the_same_command(command, tmp_path, capsys):
    # The smallest level makes 2 x 2 runs on folds and 2 final ones, of 100 steps of 0.96 seconds: 10 minutes.
    lines, sweeps, measured = command("budget=12m", "split.folds=2")
    said = capsys.readouterr().out
    assert "budget=12m" not in sum(sweeps, []) and "schedule.iterations=100" in sweeps[0]
    assert all("backbone.image_size=96" in words and "seed=0" in words for words in sweeps)
    assert set(measured) == {96, 128}  # no dearer level was measured
    assert re.search(r"would also buy: .*128 pixels", said)
    assert "Estimated: " in lines[-1] and "%" in lines[-1]
    (path,) = tmp_path.glob("which_is_best-*.json")
    kept = json.loads(path.read_text())
    assert kept["level"]["image_size"] == 96 and kept["estimate"]["on_folds"] == pytest.approx(4 * 96)

    kept["level"]["image_size"] = 112  # as if the machine had been faster then
    path.write_text(json.dumps(kept))
    lines, sweeps, measured = command("split.folds=2", "budget=12m", state="skipped")
    assert not measured and all("backbone.image_size=112" in words for words in sweeps)
    assert str(path) in capsys.readouterr().out and "%" not in lines[-1]
    path.write_text("{}")
    with pytest.raises(UserError, match="delete it"):
        command("budget=12m", "split.folds=2")


def test_a_dry_run_plans_and_writes_nothing(command, tmp_path):
    lines, sweeps, _ = command("preset=quick", "dry_run=true", state="missing")
    assert len(sweeps) == 4 and not list(tmp_path.iterdir())  # on folds and final runs of two methods
    assert not any("budget=45m" in line for line in lines)  # the hint of a comparison without a limit
    assert "128 pixels" in lines[0] and "3 folds" in lines[0] and "3 seeds" in lines[0]


def test_a_dry_run_counts_what_the_planned_runs_write(photos, tmp_path, monkeypatch, capsys):
    measured = []

    def measure(config, *_):
        measured.append((config.backbone.image_size, config.reg.name))
        return Cost(step_seconds=1.0, view_seconds=0.0, fit_seconds=(0, 0), memory_bytes=1, weights_bytes=2**20)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(planning, "measure", measure)
    monkeypatch.setattr(budget, "seconds_of_decoding", lambda *_: 0.0)
    monkeypatch.setattr(which_is_best, "seconds_beside_steps", lambda config: 0.0)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    words = ["dataset=folder", f"dataset.root={photos}", f"results_dir={tmp_path}", f"cache_dir={tmp_path}"]
    words += ["+experiment=which_is_best", "backbone=resnet18", "reg=l2,l2_fe", "device=cpu", "dry_run=true"]
    assert delta_run(monkeypatch, *words, "preset=quick") == 0
    out = capsys.readouterr().out
    assert "12 runs: 0 finished, 12 to do" in out and "12 MiB of trained weights" in out  # 3 folds and 3 seeds
    assert out.count("Not ready: disk") == 1 and "Not ready: weights of resnet18" in out
    assert sorted(measured) == [(128, "l2"), (128, "l2_fe")]  # once for the plan and for its runs
