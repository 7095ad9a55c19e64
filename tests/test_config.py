"""Every configuration composes, checks out and can be built."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from delta_transfer.common.errors import UserError
from delta_transfer.config import RunConfig, ScheduleConfig, check_values, register_schemas, to_run_config
from delta_transfer.data import READERS
from delta_transfer.methods import REGULARIZERS, build_regularizer

CONF = Path(__file__).parent.parent / "conf"
# What a choice does not go without.
NEEDS = {"reg=scratch": ["backbone.weights=none"], "reg=sum": ["+reg@reg.terms.at=at"]}


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str, name: str = "config") -> RunConfig:
    register_schemas()
    with initialize_config_module("delta_transfer.conf", version_base="1.3"):
        return to_run_config(compose(name, list(overrides)))


@pytest.mark.parametrize("group", ["dataset", "backbone", "reg", "schedule"])
def test_every_choice_composes(group):
    assert names(group)
    for name in names(group):
        choice = f"{group}={name}"
        config = composed(choice, *NEEDS.get(choice, []))
        assert config.dataset.reader in READERS
        regularizer = build_regularizer(config.reg)
        assert type(regularizer) is REGULARIZERS[name if group == "reg" else config.reg.name]


def test_every_experiment_composes():
    for name in names("experiment"):
        composed(f"+experiment={name}")


def commands() -> list[list[str]]:
    """The delta-run command that each YAML opens with, as overrides."""
    lines = [line for path in CONF.rglob("*.yaml") for line in path.read_text().splitlines()[:2]]
    found = [shlex.split(line)[2:] for line in lines if line.startswith("# delta-run ")]
    return [[o for o in command if o != "-m" and "range(" not in o and "reg=l2,l2_fe" not in o] for command in found]


def test_the_command_that_every_yaml_opens_with_composes():
    assert len(commands()) > 40
    for command in commands():
        composed(*command)
        # The group is optional: a misspelt name would compose too.
        assert {o.partition("=")[2] for o in command if "experiment/values=" in o} <= set(names("experiment/values"))


def test_every_pair_of_method_and_backbone_composes():
    for backbone in names("backbone"):
        for reg in names("reg"):
            config = composed("dataset=cub", f"backbone={backbone}", f"reg={reg}", *NEEDS.get(f"reg={reg}", []))
            assert (config.backbone.name, config.reg.name) == (backbone, "at" if reg == "sum" else reg)


def test_every_method_has_a_yaml_and_every_yaml_a_command():
    assert names("reg") == sorted(REGULARIZERS)
    for path in CONF.rglob("*.yaml"):
        lines = path.read_text().splitlines()
        assert any(line.startswith("# delta-") for line in lines[:2]), f"{path} does not open with its command"


def test_the_papers_protocol_is_the_default():
    schedule = composed("dataset=cub").schedule
    assert (schedule.iterations, schedule.batch_size, schedule.lr, schedule.momentum) == (9000, 64, 0.01, 0.9)
    assert round(schedule.decay_at * schedule.iterations) == 6000


def test_glyphs_bring_their_own_backbone_and_schedule_but_the_command_line_wins():
    config = composed()
    assert (config.dataset.name, config.backbone.name, config.schedule.batch_size) == ("glyphs", "small_resnet", 32)
    assert composed("dataset=glyphs", "backbone=resnet18").backbone.name == "resnet18"
    assert composed("dataset=glyphs", "schedule=paper").schedule.iterations == 9000


def test_options_reach_the_method():
    config = composed("reg=l2_sp", "reg.alpha=0.5", "reg.scope=conv")
    l2_sp = build_regularizer(config.reg)
    assert (l2_sp.alpha, l2_sp.scope) == (0.5, "conv")
    delta = build_regularizer(composed("reg=delta", "reg.attention.images=128").reg)
    assert delta.attention.images == 128


@pytest.mark.parametrize(
    ("schedule", "n_train", "iterations"),
    [
        (ScheduleConfig(iterations=7), 100, 7),
        (ScheduleConfig(epochs=2, batch_size=10), 100, 20),
        (ScheduleConfig(epochs=0.5, batch_size=64), 100, 1),
    ],
)
def test_length(schedule, n_train, iterations):
    assert schedule.length(n_train) == iterations


@pytest.mark.parametrize("word", ["schedule.iterations=5", "++schedule.iterations=5", "+schedule.iterations=auto"])
def test_iterations_beside_epochs_are_refused(word):
    with pytest.raises(UserError, match=re.escape(f"{word}: this schedule is as long as schedule.epochs=200 says")):
        check_values([word], composed("schedule=l2t"))


def test_epochs_replace_the_iterations_of_a_protocol():
    schedule = composed("dataset=cub", "schedule.epochs=2.5").schedule
    assert (schedule.iterations, schedule.length(5994)) == (None, 234)


def test_protocols():
    def protocol(name: str) -> ScheduleConfig:
        return composed("dataset=cub", f"schedule={name}").schedule

    paper = protocol("paper")
    assert (paper.aspect, paper.train_crop, paper.test_crops, paper.nesterov) == ("squash", "random", 1, False)
    assert (paper.backbone_lr_factor, protocol("paper_inception").lr) == (1.0, 0.001)
    augmented = protocol("paper_augmented")
    assert (augmented.aspect, augmented.train_crop, augmented.test_crops) == ("keep", "random", 10)
    tll = protocol("tll")
    assert (tll.iterations, tll.batch_size, round(tll.decay_at * tll.iterations)) == (10000, 48, 6000)
    assert (tll.train_crop, tll.nesterov, tll.backbone_lr_factor, tll.test_crops) == ("random_resized", True, 0.1, 1)


def test_protocol_of_l2t_ww():
    target = composed("dataset=cifar10", "backbone=vgg9_bn", "schedule=l2t").schedule
    assert (target.epochs, target.batch_size, target.lr, target.decay, target.pad) == (200, 128, 0.1, "cosine", 4)
    large = composed("dataset=cub", "backbone=resnet18", "schedule=l2t_224").schedule
    assert (large.batch_size, large.train_crop, large.decay, large.pad) == (64, "random_resized", "cosine", 0)
    source = composed("dataset=tiny_imagenet", "backbone=resnet32", "schedule=l2t_source", name="pretrain")
    schedule = source.schedule
    assert (schedule.decay, schedule.decay_at, schedule.decay_also_at) == ("step", 0.5, [0.75])
    assert (schedule.lr, schedule.momentum, schedule.nesterov, source.reg.weight_decay) == (0.1, 0.9, False, 1e-4)
    assert source.model_card and source.backbone.weights == "none" and not composed().model_card


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["schedule.decay=linear"], "schedule.decay must be step or cosine"),
        (["schedule.decay_also_at=[0.1]"], "schedule.decay_also_at must be in"),
        (["schedule.pad=-1"], "schedule.pad must be 0 or more"),
        (["schedule.pad=32"], r"schedule.pad \(32\) must be less than backbone.image_size \(32\)"),
        (["schedule.pad=2", "schedule.train_crop=random_resized"], "schedule.pad=2 is of schedule.train_crop=random"),
    ],
)
def test_protocols_that_are_none(overrides, expected):
    with pytest.raises(UserError, match=expected):
        composed(*overrides)


def test_data_sets_have_the_official_counts():
    counts = {name: vars(c) for name in names("dataset") if (c := composed(f"dataset={name}").dataset.official)}
    assert counts.keys() == set(names("dataset")) - {"glyphs", "glyphs_source", "glyph_pairs", "folder", "lfw"}
    assert counts["cub"] == {"classes": 200, "train": 5994, "test": 5794}
    assert counts["caltech256_60"] == {"classes": 257, "train": 15420, "test": 5140}
    for name in names("dataset"):
        config = composed(f"dataset={name}").dataset
        drawn = getattr(config, "train_per_class", None)
        if drawn and config.official:
            assert config.official.train == drawn * config.official.classes


def test_data_dir_is_where_all_data_sets_are_looked_for(monkeypatch):
    assert composed("dataset=cub").dataset.root == "data/CUB_200_2011"
    assert composed("dataset=cub", "data_dir=/d").dataset.root == "/d/CUB_200_2011"
    monkeypatch.setenv("DELTA_DATA", "/e")
    assert composed("dataset=food101").dataset.root == "/e"


def test_missing_value_is_named():
    register_schemas()
    with pytest.raises(UserError, match="dataset"):
        to_run_config(OmegaConf.structured(RunConfig))
