"""Averages of the target's weights: the formula, what is evaluated and kept, checkpoints, stages."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from delta_transfer.cli.compose import compose_config
from delta_transfer.engine.averages.ema import EMA, EMAConfig, floating_point
from delta_transfer.engine.averages.wise import GRID, Wise, WiseConfig
from delta_transfer.engine.callbacks import AVERAGES, Average, AverageConfig
from delta_transfer.experiment.experiment import run


def position(target):
    return SimpleNamespace(state=SimpleNamespace(target=target))


def change(target, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in floating_point(target).values():
            value.add_(torch.randn(value.shape, generator=generator))


@pytest.fixture
def target(tiny_source):
    return tiny_source.double().with_new_head(3, seed=0)


def test_ema_is_the_published_recursion_also_for_batchnorms_statistics(target):
    ema, naive = EMA(EMAConfig(decay=0.3)), None
    for step in range(1, 6):
        change(target, step)
        ema.on_update(position(target))
        values = {name: value.clone() for name, value in floating_point(target).items()}
        decay = min(0.3, (1 + step) / (10 + step))
        naive = values if naive is None else {n: decay * naive[n] + (1 - decay) * values[n] for n in values}
    assert any(name.endswith("running_var") for name in naive)
    for name, value in naive.items():
        torch.testing.assert_close(ema.average[name], value, rtol=0, atol=1e-12)


def test_within_applied_the_target_has_the_average_and_afterwards_its_own_weights(target):
    ema = EMA(EMAConfig())
    for step in range(3):
        change(target, step)
        ema.on_update(position(target))
    own = {name: value.clone() for name, value in floating_point(target).items()}
    with ema.applied(target):
        assert all(torch.equal(value, ema.average[name]) for name, value in floating_point(target).items())
        assert not all(torch.equal(value, own[name]) for name, value in floating_point(target).items())
    assert all(torch.equal(value, own[name]) for name, value in floating_point(target).items())


def test_an_average_goes_on_from_a_checkpoint(target):
    whole, first = EMA(EMAConfig()), EMA(EMAConfig())
    for step in range(2):
        change(target, step)
        whole.on_update(position(target))
        first.on_update(position(target))
    second = EMA(EMAConfig())
    second.load_state_dict(first.state_dict())
    change(target, 7)
    whole.on_update(position(target))
    second.on_update(position(target))
    assert whole.steps == second.steps == 3
    assert all(torch.equal(value, second.average[name]) for name, value in whole.average.items())


def test_without_an_average_the_last_weights_count(target):
    plain = AVERAGES["none"].thing(AverageConfig())
    assert type(plain) is Average and plain.state_dict() == {}
    own = {name: value.clone() for name, value in target.weights().items()}
    change(target, 0)
    plain.on_update(position(target))
    with plain.applied(target):
        assert not all(torch.equal(value, own[name]) for name, value in target.weights().items())


def batches_of(*seeds: int):
    made = (torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds)
    return [(images.double(), torch.zeros(6)) for images in made]


def wise_of(target, validate=lambda: 0.0, **options) -> Wise:
    wise = Wise(WiseConfig(**options))
    wise.begin(target, lambda: batches_of(1, 2), validate)
    return wise


def test_wise_lies_between_the_source_and_the_trained_backbone_and_keeps_the_head(target):
    wise, start = wise_of(target, a=0.3), {name: value.clone() for name, value in target.weights().items()}
    change(target, 0)
    own = {name: value.clone() for name, value in target.weights().items()}
    with wise.applied(target):
        for name, value in target.backbone_parameters().items():
            torch.testing.assert_close(value, 0.7 * start[name] + 0.3 * own[name], rtol=0, atol=1e-12)
        assert all(torch.equal(value, own[name]) for name, value in target.head_parameters().items())
    assert all(torch.equal(value, own[name]) for name, value in target.weights().items())
    assert wise.report() == {"average": {"a": 0.3}}


@pytest.mark.parametrize("a", [0.0, 1.0])
def test_at_its_ends_wise_is_one_of_both_networks_with_its_own_statistics(a, target):
    wise, start = wise_of(target, a=a), {name: value.clone() for name, value in floating_point(target).items()}
    change(target, 0)
    end = {name: value.clone() for name, value in floating_point(target).items()}
    with wise.applied(target):
        for name, value in floating_point(target).items():
            assert torch.allclose(value, (end if a or target.is_head(name) else start)[name], atol=1e-6)


def test_batchnorms_statistics_are_those_of_training_batches_unless_training_left_them(target):
    wise = wise_of(target, a=0.5, images=12)
    change(target, 0)
    with torch.no_grad():
        for name, value in target.traced.named_buffers():
            if name.endswith("running_var"):
                value.abs_()
    with wise.applied(target):
        found = target.weights()["bn1.running_mean"].clone()
        seen = torch.cat([target(images)["conv1"].transpose(0, 1).flatten(1) for images, _ in batches_of(1)], dim=1)
        more = torch.cat([target(images)["conv1"].transpose(0, 1).flatten(1) for images, _ in batches_of(2)], dim=1)
        mean = (seen.mean(dim=1) + more.mean(dim=1)) / 2
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-12)
        assert target.training  # as before
    fresh = wise_of(target, a=0.5)
    with torch.no_grad():
        target.backbone_parameters()["conv1.weight"].add_(1.0)
    statistics = target.weights()["bn1.running_mean"].clone()
    with fresh.applied(target):
        assert torch.equal(target.weights()["bn1.running_mean"], statistics)


def test_a_is_the_one_that_is_best_on_validation_images(target):
    measured = iter([50.0, 60.0, 70.0, 70.0, *([10.0] * 7)])
    wise = wise_of(target, validate=lambda: next(measured), a=None)
    change(target, 0)
    with wise.applied(target):
        pass
    with wise.applied(target):  # the same step: nothing is measured again
        pass
    assert wise.a == 0.3 and wise.report()["average"]["val_top1"][2:4] == [70.0, 70.0] and len(GRID) == 11
    wise.on_update(position(target))
    with pytest.raises(RuntimeError), wise.applied(target):
        pass


def test_wise_without_validation_images_or_a_trained_backbone_is_refused():
    from delta_transfer.common.errors import UserError
    from delta_transfer.engine.config import check_choices

    config = compose_config("config", ["average=wise", "reg=l2_fe"])
    with pytest.raises(UserError):
        check_choices(config, config.reg.build().stages())
    with pytest.raises(UserError):
        config.replace(average=config.average.replace(a=None))
    config.replace(average=config.average.replace(a=None), split=config.split.replace(val_fraction=0.2))


WORDS = ["backbone.weights=none", "dataset.test_per_class=1", "schedule.iterations=3", "schedule.batch_size=8"]
WORDS += ["schedule.log_every=1", "schedule.eval_every=0", "device=cpu"]


def made(results: Path, *words: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The record and the kept weights of a short run."""
    summary = run(compose_config("config", [*WORDS, *words, f"results_dir={results}"])).summary
    folder = results / "runs" / summary["run_id"]
    assert json.loads((folder / "summary.json").read_text())["test_top1"] == summary["test_top1"]
    return summary, load_file(folder / "model.safetensors")


def test_a_run_keeps_the_average_and_trains_as_without(tmp_path):
    plain, last = made(tmp_path, "reg=l2")
    averaged, kept = made(tmp_path, "reg=l2", "average=ema")
    assert "average" not in plain["identity"] and averaged["identity"]["average"] == {"name": "ema"}
    lines = [
        (tmp_path / "runs" / one["run_id"] / "metrics.jsonl").read_text().splitlines() for one in (plain, averaged)
    ]
    losses = [[json.loads(line)["cross_entropy"] for line in run] for run in lines]
    assert losses[0] == losses[1]
    assert any(not torch.equal(last[name], kept[name]) for name in last)


def test_a_run_chooses_a_and_records_it(tmp_path):
    plain, last = made(tmp_path, "reg=l2", "split.val_fraction=0.2")
    wise, kept = made(tmp_path, "reg=l2", "split.val_fraction=0.2", "average=wise", "average.a=null")
    assert wise["average"]["a"] in GRID and len(wise["average"]["val_top1"]) == 11
    assert wise["val_top1"] == max(wise["average"]["val_top1"])
    assert torch.equal(last["fc.weight"], kept["fc.weight"])
    assert "average" not in plain


def test_each_stage_has_an_average_of_its_own(tmp_path):
    weak = ["reg.alpha=1e-6", "reg.channel_alpha=1e-6", "schedule.lr=1e-4"]
    summary, _ = made(tmp_path, "reg=afa", "average=ema", *weak)
    assert [stage["method"] for stage in summary["stages"]] == ["AFASpatial", "AFAChannel"]
    assert summary["stages"][-1]["test_top1"] == summary["test_top1"]
