"""delta-run from the command line: every method, sweeps, and what bad input gets."""

import inspect
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.config_store import ConfigStore
from safetensors.torch import load_file, save_file

import delta_transfer
from delta_transfer.cli import compose
from delta_transfer.cli.data import main as data
from delta_transfer.cli.export import main as export
from delta_transfer.cli.help import GROUPS_WITH_HELP, sentences
from delta_transfer.cli.predict import main as predict
from delta_transfer.cli.sources import sources_of
from delta_transfer.common.options import OptionError, option
from delta_transfer.data import load_dataset
from delta_transfer.data.dataset import make_splits
from delta_transfer.engine.config import RunConfig
from delta_transfer.experiment import experiment, planning
from delta_transfer.experiment.fitting import describe_fit, fitted_path
from delta_transfer.methods import METHODS
from delta_transfer.methods.base import Penalty
from delta_transfer.models.zoo import BackboneConfig, build_source
from delta_transfer.records.arrays import image_names, predictions
from delta_transfer.records.reading import read
from delta_transfer.records.run_directory import git_commit
from delta_transfer.report import main as report

from .miniature import composed, delta_run, names, source_for, tiny_overrides, write_cub
from .test_plan import COST

DELTA_OPTIONS = ["reg.attention.images=4", "reg.attention.head_epochs=1"]


@pytest.fixture(scope="module")
def cub_root(tmp_path_factory) -> Path:
    return write_cub(tmp_path_factory.mktemp("data") / "CUB_200_2011")


@pytest.fixture(scope="module")
def tiny(cub_root, tmp_path_factory) -> RunConfig:
    """A run of three iterations, whose image store is made once."""
    return composed(*tiny_overrides(cub_root, tmp_path_factory.mktemp("results")))


def summaries(results: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in results.glob("runs/*/summary.json")}


def only_run(results: Path) -> Path:
    (path,) = (results / "runs").iterdir()
    return path


@pytest.mark.parametrize("reg", names("reg"))
def test_every_method_runs(reg, every_choice, tiny, tmp_path):
    method = every_choice["reg"][reg]
    if reg == "sum":
        method = method.replace(name="sums", terms={"l2_sp": every_choice["reg"]["l2_sp"]})
    if reg == "delta":
        method = method.replace(attention=method.attention.replace(images=6, head_epochs=2))
    named = [word.removeprefix("source=") for word in source_for(reg, tmp_path)]
    source = sources_of(named) if named else None
    experiment.run(tiny.replace(reg=method, source=source, results_dir=str(tmp_path)), [])
    run = only_run(tmp_path)
    summary = summaries(tmp_path)[run.name]
    assert re.fullmatch(rf"cub-small_resnet-{method.name}-s0-[0-9a-f]{{8}}", run.name)
    assert (summary["n_train"], summary["n_test"], summary["num_classes"]) == (18, 6, 3)
    assert summary["error"] is None and 0 <= summary["test_top1"] <= 100
    assert summary["train_seconds"] > 0 and summary["train_processor_seconds"] > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, summary["iterations"] + 1))
    assert lines[-1]["test_top1"] == summary["test_top1"]
    penalty = {"l2_sp": "weights", "delta": "feature_maps", "delta_noatt": "feature_maps"}.get(reg)
    assert penalty is None or lines[-1][penalty] > 0
    predictions = np.load(run / "predictions.npz")
    assert predictions["logits"].shape == (6, 3)
    assert summary["test_top1"] == pytest.approx(
        100 * np.mean(predictions["logits"].argmax(1) == predictions["labels"])
    )
    assert not (run / "last.pt").exists()
    assert (run / "attention.safetensors").exists() == (reg == "delta")


@pytest.fixture(scope="module")
def cache_of_glyphs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow  # test_every_method_runs is faster
@pytest.mark.parametrize("reg", [name for name in names("reg") if name != "sum"])
def test_every_method_runs_on_the_embedded_default(reg, cache_of_glyphs, tmp_path, monkeypatch):
    """The values are those that the folds chose. With others a method may diverge within five iterations."""
    places = [f"results_dir={tmp_path}", f"cache_dir={cache_of_glyphs}"]
    words = {"delta": DELTA_OPTIONS, "scratch": ["backbone.weights=none"]}.get(reg, [])
    assert delta_run(monkeypatch, f"reg={reg}", "schedule.iterations=6", *places, *words) == 0


def test_the_same_command_again_does_not_run_again(cub_root, tmp_path, monkeypatch, capsys):
    overrides = [*tiny_overrides(cub_root, tmp_path), "reg=delta", *DELTA_OPTIONS]
    assert delta_run(monkeypatch, *overrides) == 0
    before = (only_run(tmp_path) / "summary.json").read_bytes()
    assert delta_run(monkeypatch, *overrides) == 0
    assert "done, skipped" in capsys.readouterr().out
    assert (only_run(tmp_path) / "summary.json").read_bytes() == before


def test_sweep_over_methods_strengths_and_seeds(cub_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = tiny_overrides(cub_root, Path("results"))
    sweep = ["reg=l2_sp,delta_noatt", "reg.alpha=0.001,0.01", "seed=range(1,2)"]
    assert delta_run(monkeypatch, "-m", *overrides, *sweep) == 0
    runs = summaries(tmp_path / "results").values()
    seen = [(run["config"]["reg"]["name"], run["config"]["reg"]["alpha"], run["seed"]) for run in runs]
    assert sorted(seen) == sorted(itertools.product(("l2_sp", "delta_noatt"), (0.001, 0.01), (1,)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results"]  # no output directories of Hydra


def test_same_seed_twice_is_identical_and_another_seed_is_not(cub_root, tmp_path, monkeypatch):
    metrics = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):  # b has a cache of its own
        overrides = [*tiny_overrides(cub_root, tmp_path / name), "reg=delta", *DELTA_OPTIONS, f"seed={seed}"]
        assert delta_run(monkeypatch, *overrides) == 0
        run = only_run(tmp_path / name)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        metrics[name] = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
        metrics[name].append(load_file(run / "model.safetensors"))
    assert metrics["a"][:-1] == metrics["b"][:-1]
    assert all(torch.equal(value, metrics["b"][-1][key]) for key, value in metrics["a"][-1].items())
    assert metrics["a"][:-1] != metrics["c"][:-1]


def source_weights(tmp_path: Path) -> tuple[Path, dict]:
    """A file of source weights whose BatchNorm is not at its initial state, so that a change would show."""
    config = BackboneConfig(name="small_resnet", weights="none", image_size=16, resize=20, head="fc", taps=[])
    state = {name: value.clone() for name, value in build_source(config, seed=3).weights().items()}
    for name, value in state.items():
        if name.endswith(("running_mean", "running_var")):
            value += torch.rand_like(value)
    path = tmp_path / "source.safetensors"
    save_file(state, path)
    return path, state


def test_a_plain_run_executes_few_of_our_files(cub_root, tmp_path, monkeypatch):
    """Files of which a function is called between the command and summary.json; data and records are not counted."""
    package = Path(delta_transfer.__file__).parent
    called = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # neither a module nor a class
            called.add(frame.f_code.co_filename)

    path, _ = source_weights(tmp_path)
    overrides = [*tiny_overrides(cub_root, tmp_path), "reg=l2", f"backbone.weights={path}", "schedule.iterations=1"]
    sys.setprofile(note)
    try:
        assert delta_run(monkeypatch, *overrides) == 0
    finally:
        sys.setprofile(None)
    assert only_run(tmp_path).name in summaries(tmp_path)
    ours = [Path(file).relative_to(package) for file in called if Path(file).is_relative_to(package)]
    counted = sorted(file.as_posix() for file in ours if file.parts[0] not in ("data", "records"))
    assert {"cli/run.py", "experiment/experiment.py", "engine/loop.py", "models/zoo.py"} <= set(counted)
    assert len(counted) <= 15, " ".join(counted)


def test_l2_fe_leaves_parameters_and_buffers_bit_identical(cub_root, tmp_path, monkeypatch):
    path, state = source_weights(tmp_path)
    overrides = [*tiny_overrides(cub_root, tmp_path), "reg=l2_fe", f"backbone.weights={path}"]
    assert delta_run(monkeypatch, *overrides) == 0
    trained = load_file(only_run(tmp_path) / "model.safetensors")
    for name, value in state.items():
        if not name.startswith("fc."):
            assert torch.equal(trained[name], value), name
    assert trained["fc.weight"].shape == (3, state["fc.weight"].shape[1])


def test_fine_tuning_moves_parameters_and_buffers(cub_root, tmp_path, monkeypatch):
    path, state = source_weights(tmp_path)
    assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path), "reg=l2", f"backbone.weights={path}") == 0
    trained = load_file(only_run(tmp_path) / "model.safetensors")
    moved = [
        name for name, value in state.items() if not name.startswith("fc.") and not torch.equal(trained[name], value)
    ]
    assert len(moved) == len([name for name in state if not name.startswith("fc.")])


def test_attention_is_reused_by_runs_of_another_strength(cub_root, tmp_path, monkeypatch, capsys):
    base = [*tiny_overrides(cub_root, tmp_path), "reg=delta", *DELTA_OPTIONS]

    def computed(*overrides: str) -> bool:
        assert delta_run(monkeypatch, *base, *overrides) == 0
        return "computing attention" in capsys.readouterr().out

    assert computed()
    # The temperature comes after what is stored.
    assert not computed("reg.alpha=0.001", "reg.attention.temperature=1")
    assert computed("seed=1")  # other random source weights


def test_attention_is_fitted_to_everything_that_decides_it(cub_root, tmp_path):
    config = composed(*tiny_overrides(cub_root, tmp_path), "reg=delta")
    dataset = load_dataset(config.dataset)

    def fitted_to(weights: str = "w", reg: dict = {}, attention: dict = {}, **groups: dict) -> str:  # noqa: B006
        changed = {name: getattr(config, name).replace(**values) for name, values in groups.items()}
        changed["reg"] = config.reg.replace(**reg, attention=config.reg.attention.replace(**attention))
        other = config.replace(**changed)
        data = make_splits(dataset, other.dataset, other.split).fingerprint(dataset)
        return fitted_path(method := other.reg.build(), describe_fit(other, method, weights, data), tmp_path).name

    assert fitted_to(reg={"alpha": 0.5}, attention={"temperature": 1.0}) == fitted_to()
    others = [
        fitted_to(),
        fitted_to("other weights"),
        fitted_to(attention={"images": 5}),
        fitted_to(attention={"seed": 1}),
        fitted_to(dataset={"images_per_class": 4}),  # other training images
        fitted_to(backbone={"taps": ["layer1.1.conv2"]}),
        fitted_to(schedule={"aspect": "keep"}),
        fitted_to(schedule={"train_crop": "random_resized"}),
    ]
    assert len(set(others)) == len(others)


# Each gets words that say what is wrong.
BAD = {
    "negative alpha": (
        ["reg=delta", "reg.alpha=-1"],
        "reg.alpha must be at least 0, got -1.0 (strength of the penalty",
    ),
    "no taps": (["reg=delta_noatt", "backbone.taps=[]"], "backbone.taps is empty"),
    "unknown network": (["backbone.name=foo", "backbone.weights=V1"], "has no network of that name"),
    "misspelt key": (["reg=delta", "reg.alhpa=1"], "alhpa"),
    "wrong type": (["reg=delta", "reg.alpha=much"], "alpha"),
    "unknown option": (["reg=detla"], "detla"),
    "key of another method": (["reg=l2", "reg.alpha=1"], "alpha"),
    "no such tap": (["backbone.taps=[layer9]"], "no layer 'layer9'"),
    "too many images per class": (["dataset.images_per_class=7"], "has 6 training images"),
    "missing root": (["dataset.root=/no/such/folder"], "there is no folder /no/such/folder"),
    "no root": (["dataset.root=null"], "dataset.root is not set"),
    "no weights file": (["backbone.weights=/no/such.pth"], "no file /no/such.pth"),
    "no such weights": (["backbone=resnet18", "backbone.weights=IMAGENET1K_V9"], "IMAGENET1K_V1"),
    "results cannot be written": (["results_dir=/dev/null/results"], "/dev/null"),
    "split leaves nothing": (["split.val_fraction=0.01"], "too few for this validation split"),
    "head that is no Linear layer": (["backbone.head=conv1"], "is a Conv2d, not a Linear layer"),
    "head that is no layer": (["backbone.head=flatten"], "has no layer 'flatten'"),
    "head among the taps": (["reg=delta_noatt", "backbone.taps=[fc]"], "backbone.head and backbone.taps both name"),
    "reader without its options": (["dataset.reader=glyphs"], "dataset.reader=glyphs needs options"),
    "interpolation of a group": (["logging=${reg}"], "logging: its value"),
    "interpolation of nothing": (["logging=${nothing}"], "logging: its value"),
}
# Values that an option cannot have, and the option that the error is about.
REFUSED = {
    "reg.attention.seed": ["reg=delta", "reg.attention.seed=-1"],
    "dataset.reader": ["dataset.reader=foo"],
    "reg.name": ["reg.name=foo"],
    "reg.name of another method": ["reg=l2_sp", "reg.name=l2"],
    "reg.alpha": ["reg=delta", "reg.alpha=-1"],
    "schedule.batch_size": ["schedule.batch_size=0"],
    "schedule.batch_size of a giant": ["schedule.batch_size=1000000000"],
    "backbone.image_size": ["backbone.image_size=0"],
    "backbone.resize": ["backbone.image_size=32"],
    "backbone.resize of a giant": ["backbone.resize=1000000000"],
    "schedule.iterations": ["schedule.iterations=null"],
    "schedule.iterations that would not count": ["schedule=l2t"],
    "schedule.test_crops": ["schedule.test_crops=5"],
    "schedule.epochs": ["schedule.epochs=1e308"],
    "schedule.lr": ["schedule.lr=1e308"],
    "schedule.lr that is negative": ["schedule.lr=-0.1"],
    "optimizer.name": ["optimizer.name=sgdd"],
    "optimizer.name of another optimizer": ["optimizer=adamw", "optimizer.name=sgd"],
    "optimizer.momentum": ["optimizer.momentum=-1"],
    "split.fold": ["split.fold=1"],
    "split.fold out of range": ["split.folds=3", "split.fold=3"],
    "experiment/values": ["experiment/values=dogs_dleta"],
    "seed": ["seed=18446744073709551616"],
    "backbone.mean": ["backbone.mean=[nan,0,0]"],
    "device": ["device=tpu"],
    "task": ["task=verification"],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_message(case, cub_root, tmp_path, monkeypatch, capsys):
    overrides, expected = BAD[case]
    assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path), *overrides) == 1
    output = capsys.readouterr()
    assert expected in output.err
    assert "Traceback" not in output.err + output.out
    assert not summaries(tmp_path)


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_of_an_option_has_its_key(case, cub_root, tmp_path):
    with pytest.raises(OptionError) as refused:
        config = composed(*tiny_overrides(cub_root, tmp_path), *REFUSED[case])
        experiment.run(config, [])
    assert refused.value.key == case.split()[0]


def test_missing_root_names_the_layout_and_the_source(tmp_path, monkeypatch, capsys):
    random = ["backbone=resnet18", "backbone.weights=none"]  # no weights have to be fetched
    assert delta_run(monkeypatch, "dataset=cub", *random, f"results_dir={tmp_path}") == 1
    message = capsys.readouterr().err
    for part in (
        "images.txt",
        "train_test_split.txt",
        "dataset.root=DIR",
        "https://data.caltech.edu",
    ):
        assert part in message
    assert message.strip().count("\n") == 0  # one paragraph


def test_weights_that_do_not_fit_name_their_keys(cub_root, tmp_path, monkeypatch, capsys):
    path, state = source_weights(tmp_path)
    state["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3, 4)
    state["surplus"] = state.pop("bn1.weight")
    save_file(state, path)
    assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path), f"backbone.weights={path}") == 1
    message = capsys.readouterr().err
    for part in ("1 missing: bn1.weight", "1 unexpected: surplus", "layer1.0.conv1.weight (1, 2, 3, 4) instead of"):
        assert part in message


def test_pickled_code_is_not_executed(cub_root, tmp_path, monkeypatch, capsys):
    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"fc.weight": Malicious()}, tmp_path / "bad.pth")
    assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path), f"backbone.weights={tmp_path / 'bad.pth'}") == 1
    assert "is not a state dict that can be read safely" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_unreadable_images_are_all_named(tmp_path, monkeypatch, capsys):
    root = write_cub(tmp_path / "CUB")
    broken = sorted((root / "images").glob("*/*.jpg"))[3:5]
    broken[0].write_bytes(b"not an image")
    broken[1].write_bytes(broken[1].read_bytes()[:200])  # cut off
    results = tmp_path / "results"
    assert delta_run(monkeypatch, *tiny_overrides(root, results)) == 1
    message = capsys.readouterr().err
    assert "2 images of cub cannot be read" in message
    assert all(path.name in message for path in broken)
    assert not list(results.glob("cache/stores/[!.]*")) and not summaries(results)


def test_empty_class_is_named(tmp_path, monkeypatch, capsys):
    root = write_cub(tmp_path / "CUB")
    with open(root / "classes.txt", "a") as file:
        file.write("4 004.Dodo\n")
    assert delta_run(monkeypatch, *tiny_overrides(root, tmp_path / "results")) == 1
    assert "004.Dodo" in capsys.readouterr().err


def test_diverging_run_is_marked_failed_and_others_go_on(cub_root, tmp_path, monkeypatch, capsys):
    overrides = [*tiny_overrides(cub_root, tmp_path), "reg=l2", "schedule.iterations=40"]
    assert delta_run(monkeypatch, "-m", *overrides, "schedule.lr=1e20,0.01") == 1
    message = capsys.readouterr().err
    assert re.search(r"'cross_entropy' became (nan|inf) at iteration \d+ \(learning rate 1e\+20\)", message)
    failed, finished = sorted(summaries(tmp_path).values(), key=lambda s: s["error"] is None)
    assert "cross_entropy" in failed["error"] and failed["test_top1"] is None
    assert finished["error"] is None and finished["test_top1"] is not None


def test_run_that_diverges_in_its_last_step_is_marked_failed(cub_root, tmp_path, monkeypatch, capsys):
    overrides = [*tiny_overrides(cub_root, tmp_path), "reg=l2", "schedule.iterations=1", "schedule.lr=1e30"]
    assert delta_run(monkeypatch, *overrides) == 1
    assert "'test_loss' became nan" in capsys.readouterr().err
    (summary,) = summaries(tmp_path).values()
    assert "test_loss" in summary["error"] and summary["test_top1"] is None


def test_a_users_own_yaml(cub_root, tmp_path, monkeypatch):
    (tmp_path / "mine" / "reg").mkdir(parents=True)
    text = "defaults: [/schema/reg@_here_: l2_sp, _self_]\nname: l2_sp\nalpha: 0.25\n"
    (tmp_path / "mine" / "reg" / "strong.yaml").write_text(text)
    overrides = ["--config-dir", str(tmp_path / "mine"), *tiny_overrides(cub_root, tmp_path), "reg=strong"]
    assert delta_run(monkeypatch, *overrides) == 0
    (summary,) = summaries(tmp_path).values()
    assert summary["config"]["reg"]["alpha"] == 0.25


def test_validation_part_is_cut_from_train_only(cub_root, tmp_path, monkeypatch):
    assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path), "reg=l2", "split.val_fraction=0.34") == 0
    (summary,) = summaries(tmp_path).values()
    assert (summary["n_train"], summary["n_val"], summary["n_test"]) == (12, 6, 6)
    assert summary["val_top1"] is not None
    record = read(tmp_path / "runs" / summary["run_id"])
    for what, key in (("validation", "val_top1"), ("predictions", "test_top1")):
        found = predictions(record, what)
        assert 100 * found.correct.mean() == pytest.approx(summary[key])
        assert len(image_names(record, what)) == 6 and what in summary["digests"]


def test_runs_on_folds_do_not_look_at_the_test_part(cub_root, tmp_path, monkeypatch, capsys):
    tiny = tiny_overrides(cub_root, tmp_path)
    assert delta_run(monkeypatch, "-m", *tiny, "reg=l2", "split.folds=3", "split.fold=range(3)") == 0
    output = capsys.readouterr().out
    assert "val top-1" in output and "test top-1" not in output and "test_top1" not in output
    for name, summary in summaries(tmp_path).items():
        assert summary["test_top1"] is None and summary["val_top1"] is not None
        assert "split.folds=3" in summary["overrides"] and "reg=l2" in summary["overrides"]
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text()
        assert "val_top1" in lines and "test" not in lines
        assert not (tmp_path / "runs" / name / "predictions.npz").exists()
    assert len(summaries(tmp_path)) == 3


def test_ten_crops_on_kept_aspect_and_random_resized_crops(cub_root, tmp_path, monkeypatch):
    tiny = [o for o in tiny_overrides(cub_root, tmp_path) if not o.startswith("schedule.iterations")]
    for schedule in ("paper_augmented", "tll"):
        assert delta_run(monkeypatch, *tiny, f"schedule={schedule}", "schedule.iterations=2", "reg=delta_noatt") == 0
    assert len(summaries(tmp_path)) == 2
    assert len(list((tmp_path / "cache" / "stores").glob("cub-keep-*"))) == 1


def test_dry_run_prints_the_cost_alone_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "measure", lambda *_: COST)
    assert delta_run(monkeypatch, "dataset=cub", "backbone=resnet18", "reg=l2", "dry_run=true") == 0
    output = capsys.readouterr().out
    assert "--cfg job" in output and len(output.splitlines()) < 20
    assert not list(tmp_path.iterdir())


def test_help_says_what_each_key_is(monkeypatch, capsys):
    assert delta_run(monkeypatch, "--help", "reg=lwf_at", "dataset=cub") == 0
    said = capsys.readouterr().out
    for key in ("dataset.root=", "backbone.taps=", "reg.terms.at.alpha=", "schedule.lr=0.01", "optimizer.momentum=0.9"):
        assert re.search(rf"(?m)^  {re.escape(key)}\S*\s+\w", said), key
    assert "learning rate of the head" in said and "hydra.run" not in said
    assert max(map(len, said.splitlines())) <= 100  # values such as lists of taps do not fit


@pytest.mark.parametrize("words", [["--help"], ["help"], *(["help", group] for group in GROUPS_WITH_HELP), ["reg=?"]])
def test_help_fits_80_columns(words, monkeypatch, capsys):
    assert delta_run(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and len(said.splitlines()) > 2


@pytest.mark.parametrize("words", [(data,), (export,), (predict,), (report,), (report, "trust"), (report, "attention")])
def test_help_of_the_other_commands_fits_80_columns(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    command, *subcommand = words
    with pytest.raises(SystemExit):
        command([*subcommand, "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and "\n    delta-" in said


@pytest.mark.parametrize("group", GROUPS_WITH_HELP)
def test_every_choice_has_a_sentence(group):
    assert not [name for name, says in sentences(group).items() if not re.search(r"\w+ \w+", says)]


@pytest.fixture
def registered(monkeypatch) -> Iterator[str]:
    """The name of a method that is registered as docs/extend.md says, without a file in conf/."""

    class Mine(Penalty):
        """Weight decay, and a strength that nothing uses."""

        alpha: float = option(0.25, "a strength")

    monkeypatch.setattr(METHODS, "entries", METHODS.entries.copy())
    monkeypatch.setattr(compose, "_stored", compose._stored.copy())
    METHODS.register("mine", "Mine")(Mine)
    yield "mine"
    known = ConfigStore.instance().repo
    for group in (known["reg"], known["schema"]["reg"]):
        del group["mine.yaml"]


def test_a_method_that_a_program_registered_needs_no_file(registered, monkeypatch, capsys):
    reg = composed(f"reg={registered}", "reg.beta=0.5").reg
    assert (reg.name, reg.alpha, reg.beta) == ("mine", 0.25, 0.5)
    assert delta_run(monkeypatch, "help", "reg") == 0
    assert re.search(r"(?m)^  reg=mine +Weight decay, ", capsys.readouterr().out)
    assert delta_run(monkeypatch, "--help", f"reg={registered}") == 0
    assert re.search(r"(?m)^  reg.alpha=0.25 +a strength$", capsys.readouterr().out)


def test_help_lists_the_choices_of_a_folder_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "reg").mkdir()
    (tmp_path / "reg" / "strong.yaml").write_text("# A strong one. It is slow.\nname: l2_sp\n")
    assert delta_run(monkeypatch, "help", "reg", "--config-dir", str(tmp_path)) == 0
    assert re.search(r"(?m)^  reg=strong +A strong one\.$", capsys.readouterr().out)
    assert delta_run(monkeypatch, "--help", "--config-dir", str(tmp_path)) == 0
    assert "strong" in capsys.readouterr().out


def test_an_unknown_group_has_exit_status_1(monkeypatch):
    assert delta_run(monkeypatch, "help", "datset") == 1


def test_a_host_program_keeps_its_loggers(cub_root, tmp_path, monkeypatch, capsys):
    """Hydra configures the logging of jobs, which by default switches off all loggers that exist."""
    heard = []
    host = logging.getLogger("host.of.delta_transfer")
    host.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    host.addHandler(handler)
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    try:
        assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path), "reg=l2") == 0
        host.info("still here")
    finally:
        host.removeHandler(handler)
    assert heard == ["still here"] and not host.disabled
    assert (root.level, list(root.handlers)) == before
    assert "iteration 3/3" in capsys.readouterr().out  # and the package has its own


def test_the_record_names_the_commit(cub_root):
    git = ["git", "-C", str(Path(__file__).parent)]
    described = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if described.returncode:
        pytest.skip("this is no git checkout")
    assert git_commit().removesuffix("-dirty") == described.stdout.strip()


def test_start_up_does_not_wait_for_slow_libraries():
    """A misspelt key or --help must not wait for torchvision, which takes as long to import as torch."""
    slow = "torchvision", "torch._dynamo", "scipy.stats", "matplotlib", "pandas", "tensorboard"
    code = (
        f"import sys, delta_transfer.train, delta_transfer.cli.pretrain; print([m for m in {slow} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
