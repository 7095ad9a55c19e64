"""Every configuration composes, checks out and can be built; every option says what it is."""

import shlex

import pytest
from omegaconf import OmegaConf

from delta_transfer.cli.compose import check_values, to_run_config
from delta_transfer.common.errors import UserError
from delta_transfer.common.options import MISSING, OptionError, describe
from delta_transfer.data import READERS
from delta_transfer.engine import config as config_of_runs
from delta_transfer.engine.callbacks import AVERAGES
from delta_transfer.engine.config import RunConfig
from delta_transfer.engine.optimizers import OPTIMIZERS, ScheduleConfig
from delta_transfer.methods import METHODS
from delta_transfer.methods.sum import SumConfig

from .miniature import CONF, GROUPS, composed, names

# ---- what is in conf/ --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(every_choice) -> dict[str, dict[str, object]]:
    return every_choice


def test_every_file_of_every_group_composes(made):
    assert {group: sorted(of_group) for group, of_group in made.items()} == {group: names(group) for group in GROUPS}
    assert {options.reader for options in made["dataset"].values()} <= set(READERS)
    assert {options.name for options in made["optimizer"].values()} <= set(OPTIMIZERS)
    for name, options in made["reg"].items():
        assert type(options.build()) is METHODS["sum" if isinstance(options, SumConfig) else name].thing
    for experiment in names("experiment"):
        composed(f"+experiment={experiment}")
    assert {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} == {
        *(".", "experiment", "experiment/values"),
        *GROUPS,
    }  # test_plan.py tries each file of experiment/values


def test_every_pair_of_method_and_backbone_goes_together(made):
    config = composed("dataset=cub")
    for backbone in (one for one in made["backbone"].values() if one.inputs == "images"):
        for reg in made["reg"].values():
            weights = "none" if reg.name == "scratch" else backbone.weights
            both = config.replace(backbone=backbone.replace(weights=weights), reg=reg)  # which checks them
            assert (both.backbone.name, both.reg) == (backbone.name, reg)


@pytest.mark.parametrize("group", GROUPS)
def test_the_command_that_a_yaml_opens_with_has_known_words(group, made):
    """test_docs_commands.py composes them, and those of experiments."""
    kinds = {key: {name: type(options) for name, options in of_group.items()} for key, of_group in made.items()}
    kinds["optimizer"] |= {name: entry.options for name, entry in OPTIMIZERS.entries.items()}
    for name in names(group):
        _, *words = shlex.split((CONF / group / f"{name}.yaml").read_text().splitlines()[0][2:])
        pairs = [word.lstrip("+").partition("=")[::2] for word in words]
        groups = {"": RunConfig} | {f"{key}.": kinds[key][value] for key, value in pairs if key in kinds}
        known = {f"{prefix}{each.name}" for prefix, options in groups.items() for each in describe(options)}
        unknown = {key for key, _ in pairs if "reg.terms." not in key} - known - kinds.keys()
        assert not unknown, name


def test_every_method_has_a_yaml_and_every_yaml_a_command():
    assert set(METHODS) <= set(names("reg"))
    for path in CONF.rglob("*.yaml"):
        lines = path.read_text().splitlines()
        assert any(line.startswith("# delta-") for line in lines[:2]), f"{path} does not open with its command"


def test_every_option_is_described():
    """The reference, --help and error messages show the words."""
    registries = (READERS, METHODS, OPTIMIZERS, AVERAGES)
    groups = {RunConfig, *(entry.options for registry in registries for entry in registry.entries.values())}
    options = [(group.__name__, each.name, each.help) for group in groups for each in describe(group)]
    assert [option for option in options if not option[2].strip() or "\n" in option[2]] == []


# ---- the protocols -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_cub() -> RunConfig:
    return composed("dataset=cub")


def test_the_papers_protocol_is_the_default(on_cub):
    schedule, optimizer = on_cub.schedule, on_cub.optimizer
    assert (schedule.iterations, schedule.batch_size, schedule.lr) == (9000, 64, 0.01)
    assert (optimizer.name, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.9, False)
    assert round(schedule.decay_at * schedule.iterations) == 6000


def test_glyphs_bring_their_own_backbone_and_schedule_but_the_command_line_wins():
    config = composed()
    assert (config.dataset.name, config.backbone.name, config.schedule.batch_size) == ("glyphs", "small_resnet", 32)
    config = composed("dataset=glyphs", "backbone=resnet18", "schedule=paper")
    assert (config.backbone.name, config.schedule.iterations) == ("resnet18", 9000)


def test_options_reach_the_method():
    l2_sp = composed("reg=l2_sp", "reg.alpha=0.5", "reg.scope=conv").reg.build()
    assert (l2_sp.alpha, l2_sp.scope) == (0.5, "conv")
    delta = composed("reg=delta", "reg.attention.images=128").reg.build()
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
def test_iterations_beside_epochs_are_refused(word, made, on_cub):
    config = on_cub.replace(schedule=made["schedule"]["l2t"])
    with pytest.raises(OptionError) as refused:
        check_values([word], config)
    assert refused.value.key == "schedule.iterations"


def test_epochs_replace_the_iterations_of_a_protocol(on_cub):
    schedule = on_cub.schedule.replace(epochs=2.5)
    assert (schedule.iterations, schedule.length(5994)) == (None, 234)


def test_protocols(made):
    paper, augmented, tll = (made["schedule"][name] for name in ("paper", "paper_augmented", "tll"))
    assert (paper.aspect, paper.train_crop, paper.test_crops) == ("squash", "random", 1)
    assert (paper.backbone_lr_factor, made["schedule"]["paper_inception"].lr) == (1.0, 0.001)
    assert (augmented.aspect, augmented.train_crop, augmented.test_crops) == ("keep", "random", 10)
    assert (tll.iterations, tll.batch_size, round(tll.decay_at * tll.iterations)) == (10000, 48, 6000)
    assert (tll.train_crop, tll.backbone_lr_factor, tll.test_crops) == ("random_resized", 0.1, 1)


def test_a_protocol_brings_its_optimizer_but_the_command_line_wins():
    brought = composed("schedule=tll").optimizer
    assert (brought.name, brought.momentum, brought.nesterov) == ("sgd", 0.9, True)
    assert composed("schedule=tll", "optimizer=adamw").optimizer.name == "adamw"


def test_protocol_of_l2t_ww(made):
    target, large, source = (made["schedule"][name] for name in ("l2t", "l2t_224", "l2t_source"))
    assert (target.epochs, target.batch_size, target.lr, target.decay, target.pad) == (200, 128, 0.1, "cosine", 4)
    assert (large.batch_size, large.train_crop, large.decay, large.pad) == (64, "random_resized", "cosine", 0)
    assert (source.decay, source.decay_at, source.decay_also_at, source.lr) == ("step", 0.5, [0.75], 0.1)
    config = composed("dataset=tiny_imagenet", "backbone=resnet32", "schedule=l2t_source", name="pretrain")
    assert (config.optimizer.momentum, config.optimizer.nesterov, config.reg.weight_decay) == (0.9, False, 1e-4)
    assert config.model_card and config.backbone.weights == "none"


@pytest.mark.parametrize(
    ("key", "value", "more"),
    [
        ("decay", "linear", {}),
        ("decay_also_at", [0.1], {}),
        ("pad", -1, {}),
        ("pad", 2, {"train_crop": "random_resized"}),
        ("iterations", None, {}),
    ],
)
def test_protocols_that_are_none(key, value, more, made):
    with pytest.raises(OptionError) as refused:
        made["schedule"]["paper"].replace(**{key: value}, **more)
    assert refused.value.key == f"schedule.{key}"


def test_padding_beyond_the_network_is_refused(on_cub):
    side = on_cub.backbone.image_size
    with pytest.raises(OptionError) as refused:
        on_cub.replace(schedule=on_cub.schedule.replace(pad=side))
    assert refused.value.key == "schedule.pad"


def test_an_average_of_the_weights_has_its_options():
    assert (composed().average.name, composed("average=ema", "average.decay=0.9").average.decay) == ("none", 0.9)
    with pytest.raises(OptionError) as refused:
        composed("average.name=ema")
    assert refused.value.key == "average.name"


def test_nesterovs_form_needs_momentum():
    with pytest.raises(OptionError) as refused:
        composed("optimizer=nesterov", "optimizer.momentum=0")
    assert refused.value.key == "optimizer.nesterov"


# ---- data sets ---------------------------------------------------------------------------------------------


def test_data_sets_have_the_official_counts(made):
    counts = {name: vars(config.official) for name, config in made["dataset"].items() if config.official}
    without = {"glyphs", "glyphs_source", "glyph_pairs", "folder", "lfw", "bace", "clintox", "tox21"}
    without |= {"esol", "freesolv", "lipophilicity"}
    assert counts.keys() == set(names("dataset")) - without
    assert counts["cub"] == {"classes": 200, "train": 5994, "test": 5794}
    assert counts["caltech256_60"] == {"classes": 257, "train": 15420, "test": 5140}
    for config in made["dataset"].values():
        drawn = getattr(config, "train_per_class", None)
        if drawn and config.official:
            assert config.official.train == drawn * config.official.classes


def test_data_dir_is_where_all_data_sets_are_looked_for(on_cub, monkeypatch):
    monkeypatch.delenv("DELTA_DATA", raising=False)
    assert composed("dataset=cub").dataset.root == "data/CUB_200_2011"
    assert composed("dataset=cub", "data_dir=/d").dataset.root == "/d/CUB_200_2011"
    monkeypatch.setenv("DELTA_DATA", "/e")
    assert composed("dataset=food101").dataset.root == "/e"


def test_missing_value_is_named():
    assert RunConfig.__dataclass_fields__["dataset"].default == MISSING
    with pytest.raises(UserError, match="dataset"):
        to_run_config(OmegaConf.structured(RunConfig))


def test_a_crop_that_shows_little_of_an_image_is_named(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(config_of_runs, "log_once", told.append)
    for size, resize in ((224, 256), (299, 320), (32, 36), (64, 256)):
        config_of_runs.say_what_is_cropped(size, resize)
    assert len(told) == 1 and "backbone.resize=73" in told[0]
