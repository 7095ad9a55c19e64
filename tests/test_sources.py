"""Source networks other than the target's starting point: of any architecture, one or several, from delta-pretrain."""

import dataclasses
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from delta_transfer.cli import pretrain
from delta_transfer.cli.sources import named_backbone, sources_of
from delta_transfer.common.errors import UserError
from delta_transfer.common.options import from_mapping
from delta_transfer.engine.config import check_choices, name_of
from delta_transfer.experiment import planning as plan
from delta_transfer.experiment.costs import measure
from delta_transfer.inspect.replay import replay
from delta_transfer.methods import METHODS
from delta_transfer.models import FrozenSources, Network, frozen_maps
from delta_transfer.models.sources import load_sources
from delta_transfer.models.zoo import BackboneConfig, ResNet32, build_source, weights_file
from delta_transfer.records.cards import in_words, make_card, metadata_of, read_card
from delta_transfer.records.checked import fingerprint, load_with_checksum, save_with_checksum
from delta_transfer.reporting.comparison import compare

from . import children
from .miniature import composed, delta_run, tiny_overrides, write_cub
from .test_faults import assert_the_same
from .test_plan import COST

SMALL = ["backbone.image_size=16", "backbone.resize=16", "schedule.iterations=2", "schedule.batch_size=4", "device=cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A miniature CUB, and source networks trained on it by delta-pretrain: model.safetensors by network."""
    top = tmp_path_factory.mktemp("sources")
    root = write_cub(top / "CUB_200_2011")
    found = {"root": root, "top": top}
    for network, normalisation in (("resnet32", []), ("small_resnet", ["backbone.mean=[0.4,0.5,0.6]"])):
        data = ["dataset=cub", f"dataset.root={root}", "schedule=l2t_source", *SMALL, *normalisation]
        command = [
            "delta-pretrain",
            *data,
            f"backbone={network}",
            f"results_dir={top / network}",
            "schedule.epochs=null",
        ]
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as stop:
            monkeypatch.setattr(sys, "argv", command)
            pretrain.main()
        assert not stop.value.code
        (found[network],) = (top / network / "runs").glob("*/model.safetensors")
    return found


def overrides(made: dict[str, Path], results: Path, *sources: str, reg: str = "l2t_ww") -> list[str]:
    names = [str(made.get(source, source)) for source in sources]
    given = [f"source=[{','.join(names)}]"] if sources else []
    # The sources are hardly trained: their maps are far from what BatchNorm would make of them.
    method = [f"reg={reg}", *(["reg.alpha=1e-6", "reg.inner_steps=1"] if reg == "l2t_ww" else [])]
    return [*tiny_overrides(made["root"], results), "schedule.iterations=1", *method, *given]


def only_run(results: Path) -> Path:
    (run,) = (results / "runs").iterdir()
    return run


def record_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


# ---- runs ------------------------------------------------------------------------------------------------


def test_a_target_learns_from_a_network_of_another_architecture(made, tmp_path, monkeypatch):
    assert delta_run(monkeypatch, *overrides(made, tmp_path, "resnet32")) == 0
    run = only_run(tmp_path)
    record = record_of(run)
    assert [source["name"] for source in record["sources"]] == ["resnet32"]
    (source,) = record["sources"]
    assert source["weights"] == str(made["resnet32"]) and source["taps"] == ["layer1", "layer2", "layer3"]
    assert source["weights_fingerprint"] == fingerprint(load_file(made["resnet32"]))
    pairs = [f"resnet32/{m}>{n}" for m in source["taps"] for n in record["config"]["backbone"]["taps"]]
    learned = load_with_checksum(run / "method.safetensors")[0]
    adapters = {name.removeprefix("stage1.adapters.") for name in learned if ".adapters." in name}
    assert {f"{pair.replace('.', '/')}.weight" for pair in pairs} <= adapters
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["matching"] > 0


def test_heterogeneous_sources_have_meta_networks_of_their_own(made, tmp_path, monkeypatch):
    sources = ("resnet32", "small_resnet", "resnet32")
    assert delta_run(monkeypatch, *overrides(made, tmp_path, *sources)) == 0
    run = only_run(tmp_path)
    names = ["resnet32", "small_resnet", "resnet32_2"]
    assert [source["name"] for source in record_of(run)["sources"]] == names
    learned = load_with_checksum(run / "method.safetensors")[0]
    for kind in ("adapters", "meta_networks"):
        pairs = {name.split(".")[2] for name in learned if name.startswith(f"stage1.{kind}.")}
        assert {pair.split("/")[0] for pair in pairs} == set(names) and len(pairs) == 3 * 9
    assert [source.name for source in replay(run).sources] == names


def test_a_run_that_is_stopped_in_meta_training_ends_the_same(made, tmp_path):
    """A run that is killed or asked to end between two lines of metrics ends with the same weights and moments."""
    schedule = ["schedule.iterations=8", "schedule.log_every=3", "schedule.checkpoint_seconds=0.000001"]

    def arguments(name: str) -> list[str]:
        return [*overrides(made, tmp_path / name, "resnet32", "small_resnet"), *schedule]

    assert children.finish(arguments("whole"))[0] == 0
    for name, number in (("killed", signal.SIGKILL), ("asked", signal.SIGTERM)):
        status, output = children.finish(arguments(name), children.AtStep(5, number))
        assert status in (-signal.SIGKILL, 128 + signal.SIGTERM), output
        status, output = children.finish(arguments(name))
        assert status == 0 and "resuming after iteration" in output
        assert_the_same(only_run(tmp_path / name), only_run(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("source", "target", "source_taps", "taps"),
    [
        ("resnet32", "vgg9_bn", ["layer1", "layer2", "layer3"], [f"group{i}" for i in range(5)]),
        pytest.param("resnet34", "resnet18", *[[f"layer{i}" for i in range(1, 5)]] * 2, marks=pytest.mark.slow),
    ],
)
def test_the_published_pairs_of_networks_train(source, target, source_taps, taps, made, tmp_path, monkeypatch):
    """Images of 32 pixels take the place of those of 224, which experiment=l2tww_main_224 has."""
    file = tmp_path / "source.safetensors"
    save_file(build_source(named_backbone(source).replace(weights="none", taps=[]), seed=1).weights(), file)
    command = [*tiny_overrides(made["root"], tmp_path), f"backbone={target}", "backbone.weights=none", "reg=l2t_ww"]
    command += ["backbone.image_size=32", "backbone.resize=32", f"backbone.taps=[{','.join(taps)}]"]
    command += [f"source=[{{use:'{source}:{file}',taps:[{','.join(source_taps)}]}}]", "reg.alpha=1e-3"]
    assert delta_run(monkeypatch, *command, "schedule.iterations=1") == 0
    run = only_run(tmp_path)
    pairs = {
        name.split(".")[2] for name in load_with_checksum(run / "method.safetensors")[0] if ".meta_networks." in name
    }
    assert pairs == {f"{source}/{m}>{n}" for m in source_taps for n in taps}
    assert record_of(run)["error"] is None


def test_the_source_decides_and_its_place_does_not(made, tmp_path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(made["small_resnet"].read_bytes())
    config = composed(*overrides(made, tmp_path))

    def name(*sources: str | dict) -> str:
        found = sources_of(list(sources)) if sources else None
        return name_of(config.replace(source=found), "data", "none", found and load_sources(found, tapped=False))[0]

    resnet32, small = str(made["resnet32"]), str(made["small_resnet"])
    assert name(small) == name(str(moved)) == name({"use": str(moved)})
    others = [(), (small,), (resnet32,), (small, small), (small, resnet32), (resnet32, small)]
    others += [({"use": small, "taps": ["layer3"]},), (f"small_resnet:{small}",)]  # the last is normalised otherwise
    assert len({name(*sources) for sources in others}) == len(others)


def test_runs_with_other_sources_are_other_rows(made, tmp_path, monkeypatch):
    for sources in (["resnet32"], ["small_resnet"]):
        assert delta_run(monkeypatch, *overrides(made, tmp_path, *sources)) == 0
    table = compare([record_of(run) for run in (tmp_path / "runs").iterdir()])
    assert len(table.rows) == 2
    assert {row.backbone for row in table.rows} == {f"{name} -> small_resnet" for name in ("resnet32", "small_resnet")}
    assert str(tmp_path) not in " ".join(row.settings for row in table.rows)


def test_a_network_of_conf_has_its_own_taps_unless_others_are_named():
    resnet = sources_of(["resnet34"])[0].backbone
    assert (resnet.name, resnet.weights, resnet.taps[0]) == ("resnet34", "IMAGENET1K_V1", "layer1.2.conv2")
    (source,) = composed("dataset=cub", "source={use: 'resnet34:/w.safetensors', taps: [layer1, layer4]}").source
    assert (source.backbone.weights, source.backbone.taps) == ("/w.safetensors", ["layer1", "layer4"])


def test_embedded_weights_are_found_for_a_source():
    """source=small_resnet has weights=glyphs, which come with the package."""
    (source,) = load_sources(sources_of("small_resnet"), tapped=True)
    assert source.fingerprint == read_card(weights_file("glyphs"))["weights_fingerprint"]


# ---- what is refused -------------------------------------------------------------------------------------


START_AT_SOURCE = sorted(name for name in METHODS if name != "sum" and not METHODS[name].thing.needs.other_sources)


def test_scratch_stands_beside_methods_with_a_source():
    config = composed("dataset=glyphs", "backbone=small_vgg", "reg=scratch", "source=small_resnet")
    check_choices(config, config.reg.build().stages())


@pytest.mark.parametrize("reg", [*START_AT_SOURCE, "lwf_at +reg@reg.terms.l2_sp=l2_sp reg.name=lwf_at_l2_sp"])
def test_methods_that_start_at_their_source_take_no_other(reg, made, tmp_path, monkeypatch, capsys):
    reg, *more = reg.split()
    command = [*overrides(made, tmp_path, "resnet32", reg=reg), *more]
    if reg == START_AT_SOURCE[0]:  # a dry run refuses it, too
        assert delta_run(monkeypatch, *command, "dry_run=true") == 1
        assert "starts at its source network" in capsys.readouterr().err
    assert delta_run(monkeypatch, *command) == 1
    assert f"reg={reg}" in (said := capsys.readouterr().err) and "starts at its source network" in said


def test_nothing_is_learned_from_a_random_network(made, tmp_path, monkeypatch, capsys):
    assert delta_run(monkeypatch, *overrides(made, tmp_path)) == 1
    assert "backbone.weights=none is a random one: name a source" in capsys.readouterr().err
    assert delta_run(monkeypatch, *overrides(made, tmp_path, "vgg9_bn")) == 1
    assert "source=vgg9_bn has no weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/nowhere.safetensors", "there is no file /nowhere.safetensors"),
        ("resnet35", "neither a .safetensors file of delta-pretrain nor one of conf/backbone"),
        ([], "names no network"),
        ([3], "got 3"),
        ({"taps": ["layer1"]}, "use: one of these"),
        ({"use": "resnet32", "taps": "layer1"}, "use: one of these"),
        ({"use": "resnet32", "taps": ["layer1", "layer1"]}, "names a layer twice"),
    ],
)
def test_what_is_no_source_is_said(source, expected):
    with pytest.raises(UserError, match="source") as refused:
        sources_of(source)
    assert expected in str(refused.value)


def test_a_file_that_is_not_there_is_named(made, tmp_path, monkeypatch, capsys):
    assert delta_run(monkeypatch, *overrides(made, tmp_path), "source=resnet32:/nowhere.safetensors") == 1
    assert "there is no file /nowhere.safetensors" in capsys.readouterr().err


def test_taps_that_the_source_does_not_have_are_named(made, tmp_path, monkeypatch, capsys):
    source = f"{{use: {made['resnet32']}, taps: [layer9]}}"
    assert delta_run(monkeypatch, *overrides(made, tmp_path), f"source={source}") == 1
    assert "source=resnet32: ResNet32 has no layer 'layer9'" in capsys.readouterr().err


# ---- model cards -----------------------------------------------------------------------------------------


def test_the_card_says_what_delta_pretrain_did(made):
    card, record = read_card(made["resnet32"]), record_of(made["resnet32"].parent)
    config = record["config"]["backbone"] | {"weights": str(made["resnet32"])}
    (source,) = sources_of(str(made["resnet32"]))
    assert source.backbone == from_mapping(BackboneConfig, config)
    assert source.expected == card["weights_fingerprint"] == fingerprint(load_file(made["resnet32"]))
    assert card["classes"] == ["001.Bird_0", "002.Bird_1", "003.Bird_2"]
    assert card["data"] == {
        "name": "cub",
        "fingerprint": record["dataset_fingerprint"],
        **{key: record[key] for key in ("n_train", "n_val", "n_test")},
    }
    assert card["measured"] == {"test_top1": record["test_top1"], "crops": 1, "mirrored": True}
    assert card["command"].startswith("delta-pretrain dataset=cub")
    words = (made["resnet32"].parent / "MODEL_CARD.md").read_text()
    for said in (card["command"], record["dataset_fingerprint"], card["weights_fingerprint"], record["run_id"]):
        assert said in words
    assert f"{record['test_top1']:.2f} % of n = 6 test images" in words
    assert "16-pixel images, from random weights\n" in words
    backbone = record["config"]["backbone"] | {"weights": "somewhere/fine.safetensors"}
    other = record | {"config": record["config"] | {"backbone": backbone}}
    fine_tuned = in_words(make_card(other, ("a", "b"), "d" * 64))
    assert "random" not in fine_tuned and "from the weights fine.safetensors\n" in fine_tuned


def test_only_delta_pretrain_writes_a_card(made, tmp_path, monkeypatch):
    assert delta_run(monkeypatch, *overrides(made, tmp_path, reg="l2")) == 0
    assert not (only_run(tmp_path) / "MODEL_CARD.md").exists()
    with pytest.raises(UserError, match="has no model card.*source=NAME:"):
        read_card(only_run(tmp_path) / "model.safetensors")


def test_a_loaded_source_is_the_network_that_was_trained(made):
    (source,) = load_sources(sources_of(str(made["small_resnet"])), tapped=True)
    assert source.backbone.mean == [0.4, 0.5, 0.6] and source.network.classes == 3
    trained = load_file(made["small_resnet"])
    assert all(torch.equal(value, trained[name]) for name, value in source.network.weights().items())


def damaged(made: dict[str, Path], to: Path, change) -> Path:
    """The source network with another card, whose own checksum is right unless `change` returns text."""
    state, metadata = load_with_checksum(made["resnet32"])
    changed = change(json.loads(metadata["model_card"]))
    metadata |= {"model_card": changed} if isinstance(changed, str) else metadata_of(changed)
    to.write_bytes(save_with_checksum(state, metadata))
    return to


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda card: json.dumps(card).replace("0.485", "0.486"), "its checksum is wrong"),
        (lambda card: card | {"format": 2}, "its format is 2"),
        (lambda card: [card], ""),
        (lambda card: {k: v for k, v in card.items() if k != "network"}, "'network'"),
        (lambda card: card | {"network": {"name": "resnet32"}}, "backbone.image_size has no value"),
        (lambda card: card | {"network": card["network"] | {"std": [0.0, 1.0, 1.0]}}, "backbone.std must be"),
        (lambda card: card | {"network": card["network"] | {"taps": 3}}, "backbone.taps has a value of another type"),
        (lambda card: card | {"network": card["network"] | {"code": "x"}}, "backbone has no code"),
    ],
)
def test_a_damaged_card_is_refused(change, expected, made, tmp_path):
    with pytest.raises(UserError, match=f"source: the model card of .* cannot be used: .*{expected}"):
        sources_of(str(damaged(made, tmp_path / "model.safetensors", change)))


def test_a_card_is_not_interpolated(made, tmp_path):
    evil = damaged(
        made,
        tmp_path / "model.safetensors",
        lambda card: card | {"network": card["network"] | {"name": "${oc.env:HOME}"}},
    )
    with pytest.raises(UserError, match=r"backbone.name=\${oc.env:HOME}"):
        load_sources(composed("dataset=cub", f"source={evil}").source, tapped=False)


def test_a_card_of_other_weights_is_refused(made, tmp_path):
    file = damaged(made, tmp_path / "model.safetensors", lambda card: card | {"weights_fingerprint": "0" * 64})
    with pytest.raises(UserError, match="the model card describes other weights"):
        load_sources(sources_of(str(file)), tapped=False)


def test_a_file_without_a_card_goes_by_name(made, tmp_path, monkeypatch):
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(made["resnet32"]), plain)
    assert delta_run(monkeypatch, *overrides(made, tmp_path / "results", f"resnet32:{plain}")) == 0


# ---- the frozen networks ---------------------------------------------------------------------------------


def test_images_are_renormalised_for_each_source(tiny_source):
    """Each source sees what its own loader would have made of the same pixels."""
    pixels = torch.rand(4, 3, 8, 8, dtype=torch.float64)

    def normalised(mean: list[float], std: list[float]) -> torch.Tensor:
        return ((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).float()

    of = {"same": ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]), "other": ([0.1, 0.2, 0.7], [0.5, 0.25, 0.1])}
    maps = frozen_maps(tiny_source, with_logits=True)
    sources = FrozenSources({"same": maps, "other": frozen_maps(tiny_source, with_logits=True)}, of, of["same"])
    outputs = sources(normalised(*of["same"]))
    assert list(outputs) == [f"{name}/{key}" for name in of for key in maps(normalised(*of["same"]))]
    for key, value in maps(normalised(*of["same"])).items():
        assert torch.equal(outputs[f"same/{key}"], value)
    for key, value in maps(normalised(*of["other"])).items():
        torch.testing.assert_close(outputs[f"other/{key}"], value, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(outputs[f"other/{key}"], outputs[f"same/{key}"], atol=1e-2)


def test_methods_hear_the_shapes_of_maps_and_logits(made, tmp_path, monkeypatch):
    heard = {}
    method = METHODS["l2t_ww"].thing

    class Listening(method):
        needs = dataclasses.replace(method.needs, source_logits=True)

        def setup(self, target, map_shapes, source_shapes):
            heard.update(source_shapes)
            maps = {name: shape for name, shape in source_shapes.items() if len(shape) == 3}
            super().setup(target, map_shapes, maps)

        def penalty(self, target, outputs, source_outputs):
            shapes = {name: value.shape[1:] for name, value in source_outputs.items()}
            assert {name: shape for name, shape in shapes.items() if not name.endswith("embedding")} == heard
            return super().penalty(target, outputs, source_outputs)

    monkeypatch.setitem(METHODS.entries, "l2t_ww", dataclasses.replace(METHODS["l2t_ww"], thing=Listening))
    assert delta_run(monkeypatch, *overrides(made, tmp_path, "resnet32", "small_resnet")) == 0
    assert heard["resnet32/layer2"] == (32, 8, 8) and heard["small_resnet/logits"] == (3,)
    assert len(heard) == 3 + 3 + 2


def test_a_dry_run_looks_at_the_sources(made, tmp_path, monkeypatch, capsys):
    command = overrides(made, tmp_path, "small_resnet", "small_resnet")
    monkeypatch.setattr(plan, "measure", lambda *_: COST)
    assert delta_run(monkeypatch, *command, "dry_run=true") == 0
    assert "1 run: 0 finished, 1 to do" in capsys.readouterr().out
    assert delta_run(monkeypatch, *command) == 0
    assert delta_run(monkeypatch, *command, "dry_run=true") == 0
    assert "1 run: 1 finished, 0 to do" in capsys.readouterr().out
    absent = overrides(made, tmp_path, f"resnet32:{tmp_path / 'absent.safetensors'}")
    assert delta_run(monkeypatch, *absent, "dry_run=true") == 0
    assert "Not ready: source resnet32: " in capsys.readouterr().out


def test_the_cost_of_sources_is_measured_without_their_weights(tmp_path):
    """Each further source adds the memory of its weights and of the values that a step keeps."""

    def memory(*sources: str) -> int:
        size = ["backbone=small_resnet", "backbone.image_size=8", "backbone.resize=8", "schedule.batch_size=4"]
        named = [f"source=[{','.join(f'{{use: {name}:absent.pth, taps: [layer1]}}' for name in sources)}]"]
        config = composed("dataset=cub", "reg=l2t_ww", "reg.meta_lr=0", *size, *named, "backbone.taps=[layer1]")
        config.precision = "fp32"
        return measure(config, config.reg.build().stages(), 7, torch.device("cpu")).memory_bytes

    of_resnet32 = 4 * sum(p.numel() for p in ResNet32(1000).parameters() if p.dim() == 4)
    assert memory("small_resnet", "resnet32") - memory("small_resnet") > of_resnet32 / 40  # one of its three stages


def test_a_rebuilt_run_refuses_other_source_weights(made, tmp_path, monkeypatch):
    file = tmp_path / "source.safetensors"
    file.write_bytes(made["resnet32"].read_bytes())
    assert delta_run(monkeypatch, *overrides(made, tmp_path / "results", f"resnet32:{file}")) == 0
    state = load_file(file)
    save_file(state | {"fc.bias": state["fc.bias"] + 1}, file)
    run = replay(only_run(tmp_path / "results"))
    assert isinstance(run.target, Network)
    with pytest.raises(UserError, match="weights of source=resnet32 .* are not those that the run was made with"):
        _ = run.sources
