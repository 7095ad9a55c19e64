"""Networks, their weights, heads and taps."""

import dataclasses
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchvision.models import get_model, mobilenet_v2, resnet18

from delta_transfer.common.errors import UserError
from delta_transfer.data import contents
from delta_transfer.engine.config import user_of_source_head
from delta_transfer.experiment.experiment import run
from delta_transfer.models import Network, frozen_maps
from delta_transfer.models.graph_networks import GRAPH_NETWORKS
from delta_transfer.models.zoo import BackboneConfig, build_source
from delta_transfer.records.checked import fingerprint, save_with_checksum

from .miniature import composed
from .trees import write_folder

CONF = Path(__file__).parent.parent / "conf" / "backbone"
PUBLISHED_CHANNELS = {
    "resnet50": [256, 512, 1024, 2048],
    "resnet101": [256, 512, 1024, 2048],
    "inception_v3": [64, 192, 288, 768],
    "mobilenet_v2": [32, 64, 96, 320],
}
PUBLISHED_SIZES = {"resnet101": [56, 28, 14, 7], "inception_v3": [147, 71, 35, 17], "mobilenet_v2": [28, 14, 14, 7]}


def backbone(name: str, **changes) -> BackboneConfig:
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    values.pop("defaults")
    return dataclasses.replace(BackboneConfig(**values), weights="none", **changes)


@pytest.mark.parametrize(
    "name", sorted({path.stem for path in CONF.glob("*.yaml")} - {"timm", "torchvision", *GRAPH_NETWORKS})
)
def test_every_backbone_returns_logits_and_its_taps(name):
    config = backbone(name)
    target = build_source(config, seed=0).with_new_head(7, seed=0).eval()
    size = config.image_size if name in PUBLISHED_SIZES else 64
    with torch.no_grad():
        outputs = target(torch.randn(1, 3, size, size))
    assert outputs["logits"].shape == (1, 7)
    assert set(outputs) == {"logits", "embedding", *config.taps}
    if name in PUBLISHED_CHANNELS:
        assert [outputs[tap].shape[1] for tap in config.taps] == PUBLISHED_CHANNELS[name]
    if name in PUBLISHED_SIZES:
        assert [outputs[tap].shape[2] for tap in config.taps] == PUBLISHED_SIZES[name]


def test_traced_network_is_the_original():
    model = resnet18(num_classes=5)
    network = Network(model, "fc", ("layer2.1.conv2",)).eval()
    model.eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network(images)["logits"], model(images))
    assert set(network.weights()) == set(model.state_dict())
    assert all(network.weights()[name].data_ptr() == value.data_ptr() for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "parameters", "maps"),
    [
        # Convolutions (3x3 * in * out), BatchNorm (2 * C) and the linear layer, added up by hand.
        ("resnet32", 466_922, {"layer1": (16, 32), "layer2": (32, 16), "layer3": (64, 8)}),
        (
            "vgg9_bn",
            9_231_114,
            {f"group{i}": s for i, s in enumerate([(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)])},
        ),
    ],
)
def test_networks_of_l2t_ww(name, parameters, maps):
    network = build_source(backbone(name), seed=0).with_new_head(10, seed=0)
    images = torch.randn(2, 3, 32, 32)
    outputs = network.train()(images)
    assert {tap: tuple(outputs[tap].shape[1:3]) for tap in network.taps} == maps
    assert all((outputs[tap] >= 0).all() and (outputs[tap] == 0).any() for tap in network.taps)  # behind the ReLU
    assert sum(p.numel() for p in network.parameters()) == parameters
    outputs["logits"].sum().backward()
    assert all(p.grad is not None for p in network.parameters())  # none is unused


@pytest.mark.parametrize("name", ["resnet32", "vgg9_bn"])
def test_networks_of_l2t_ww_begin_as_published(name):
    model = build_source(backbone(name), seed=0).with_new_head(300, seed=1).model  # as a run trains it
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    for convolution in convolutions:
        fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
        assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
        assert convolution.bias is None or not convolution.bias.any()
    with_bias = [convolution.bias is not None for convolution in convolutions]
    if name == "resnet32":
        assert with_bias == [True] + [False] * (30 + 2)  # the first; shortcuts are 1x1 convolutions
        assert [c.stride for c in convolutions if c.kernel_size == (1, 1)] == [(2, 2)] * 2
    else:
        assert all(with_bias) and len(convolutions) == 8
        assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02) and not model.fc.bias.any()


@pytest.mark.parametrize(
    ("name", "head", "size"),
    [("mobilenet_v2", "classifier.1", 64), ("inception_v3", "fc", 96), ("mobilenet_v3_small", "classifier.3", 64)],
)
def test_the_embedding_is_what_dropout_is_given(name, head, size):
    """Where dropout overwrites it, too; the logits are still made of what is left of it."""
    options = {"init_weights": False} if name == "inception_v3" else {}
    network = Network(get_model(name, num_classes=4, **options), head).train()
    images = torch.randn(4, 3, size, size)
    one, other = network(images), network(images)  # with masks of their own
    assert torch.equal(one["embedding"], other["embedding"]) and not torch.equal(one["logits"], other["logits"])
    head = network.traced.get_submodule(network.head)
    outputs = network.eval()(images)
    torch.testing.assert_close(head(outputs["embedding"]), outputs["logits"])


def test_a_tap_may_be_the_output_of_a_whole_stage():
    model = resnet18(num_classes=5).eval()
    network = Network(model, "fc", ("layer1", "layer2", "layer3", "layer4")).eval()
    images = torch.randn(2, 3, 64, 64)
    outputs, x = network(images), model.maxpool(model.relu(model.bn1(model.conv1(images))))
    assert len(network.taps) == 4
    for tap in network.taps:
        x = model.get_submodule(tap)(x)
        assert torch.equal(outputs[tap], x) and (x >= 0).all()
        torch.testing.assert_close(frozen_maps(network)(images)[tap], x, rtol=1e-4, atol=1e-5)


def test_inception_auxiliary_head():
    ignored = build_source(backbone("inception_v3"), seed=0).with_new_head(7, seed=0).train()
    assert "aux_logits" not in ignored(torch.randn(2, 3, 96, 96))  # its branch would need 299 pixels
    trained = build_source(backbone("inception_v3", aux_weight=0.4), seed=0).with_new_head(7, seed=0).train()
    assert trained(torch.randn(2, 3, 299, 299))["aux_logits"].shape == (2, 7)
    assert {"AuxLogits.fc.weight", "fc.weight"} <= set(trained.head_parameters())
    assert "AuxLogits.conv0.conv.weight" in trained.backbone_parameters()  # pretrained: part of L2-SP
    assert "aux_logits" not in trained.eval()(torch.randn(2, 3, 96, 96))


def test_new_head_depends_on_its_seed_only_and_leaves_the_rest():
    source = build_source(backbone("small_resnet"), seed=0)
    torch.manual_seed(123)
    one = source.with_new_head(4, seed=1)
    torch.manual_seed(456)
    same, other = source.with_new_head(4, seed=1), source.with_new_head(4, seed=2)
    assert torch.equal(one.head_parameters()["fc.weight"], same.head_parameters()["fc.weight"])
    assert not torch.equal(one.head_parameters()["fc.weight"], other.head_parameters()["fc.weight"])
    for name, p in one.backbone_parameters().items():
        assert torch.equal(p, source.backbone_parameters()[name])
        assert p is not source.backbone_parameters()[name]


def small_state() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in build_source(backbone("small_resnet"), seed=5).weights().items()}


def load(path: Path, **changes) -> Network:
    return build_source(dataclasses.replace(backbone("small_resnet"), weights=str(path), **changes), seed=0)


def test_weights_files_in_every_form(tmp_path):
    state = small_state()
    expected = fingerprint(state)
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "checkpoint.pth")
    for file in ("plain.safetensors", "plain.pth", "checkpoint.pth"):
        assert fingerprint(load(tmp_path / file).weights()) == expected


def test_weights_with_a_wrong_checksum_are_refused(tmp_path):
    """Files that runs leave carry one; those of other programs need none."""
    path = tmp_path / "model.safetensors"
    data = bytearray(save_with_checksum(small_state()))
    path.write_bytes(data)
    load(path)
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="model.safetensors is not a state dict .*: its checksum is wrong"):
        load(path)


def test_half_precision_files_are_cast(tmp_path):
    state = {k: v.half() for k, v in small_state().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "half.safetensors")
    assert all(p.dtype == torch.float32 for p in load(tmp_path / "half.safetensors").parameters())


def test_source_keeps_the_head_of_its_weights_and_does_without_one(tmp_path):
    state = small_state()
    state["fc.weight"], state["fc.bias"] = torch.randn(17, 128), torch.randn(17)
    save_file(state, tmp_path / "17.safetensors")
    assert load(tmp_path / "17.safetensors").weights()["fc.weight"].shape == (17, 128)
    headless = {name: value for name, value in state.items() if not name.startswith("fc.")}
    save_file(headless, tmp_path / "headless.safetensors")
    assert torch.equal(load(tmp_path / "headless.safetensors").weights()["conv1.weight"], state["conv1.weight"])


@pytest.mark.parametrize("setting", ["reg=lwf", "reg=co_tuning", "evaluate.forgetting=true"])
def test_a_source_without_a_head_is_refused_where_its_head_is_used(setting, tmp_path):
    state = {name: value for name, value in small_state().items() if not name.startswith("fc.")}
    save_file(state, tmp_path / "headless.safetensors")
    config = composed("dataset=glyphs", setting, f"backbone.weights={tmp_path / 'headless.safetensors'}")
    user = user_of_source_head(config, config.reg.build().stages())
    assert user == setting
    with pytest.raises(UserError, match=setting):
        build_source(config.backbone, 0, True, user)
    assert user_of_source_head(composed("reg=delta"), []) is None


def test_a_failed_download_is_known_before_images_are_read_and_after_their_folders(tmp_path, monkeypatch):
    def no_network(*_arguments, **_options):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(contents, "_read", lambda path: pytest.fail(f"{path} is read"))
    write_folder(tmp_path / "photos", ants=2, bees=2)
    words = ["dataset=folder", "backbone=resnet18", "device=cpu", f"results_dir={tmp_path / 'results'}"]
    for folder, expected in (("photos", "backbone.weights=/path/to/resnet18"), ("photos/ants", "no class folder")):
        with pytest.raises(UserError, match=expected):
            run(composed(*words, f"dataset.root={tmp_path / folder}"))
    with pytest.raises(UserError, match="dataset.root is not set"):
        run(composed(*words))


def test_a_batch_that_batchnorm_cannot_take_is_refused_in_our_words():
    with pytest.raises(UserError) as refused:
        build_source(dataclasses.replace(backbone("resnet18"), weights="none"), 0).map_shapes(1, 32, training=True)
    assert "BatchNorm needs" in str(refused.value) and "torch" not in str(refused.value)


def test_absent_head_is_the_same_for_every_seed(tmp_path):
    headless = {name: value for name, value in small_state().items() if not name.startswith("fc.")}
    save_file(headless, tmp_path / "headless.safetensors")
    config = dataclasses.replace(backbone("small_resnet"), weights=str(tmp_path / "headless.safetensors"))
    assert len({fingerprint(build_source(config, seed).weights()) for seed in range(2)}) == 1


def test_inception_reads_the_file_that_its_own_run_writes(tmp_path):
    trained = build_source(backbone("inception_v3"), seed=0).with_new_head(7, seed=0)
    save_file({k: v.contiguous() for k, v in trained.weights().items()}, tmp_path / "model.safetensors")
    config = dataclasses.replace(backbone("inception_v3"), weights=str(tmp_path / "model.safetensors"))
    assert fingerprint(build_source(config, seed=1).weights()) == fingerprint(trained.weights())


def test_tapped_map_is_not_overwritten_by_an_inplace_relu():
    model = resnet18(num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.bn1(model.conv1(images))
        for mode in (True, False):
            network = Network(model, "fc", ("bn1",)).train(mode)
            model.bn1.eval()
            torch.testing.assert_close(network(images)["bn1"], expected)
    assert (expected < 0).any()


def test_file_that_is_not_a_state_dict(tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(UserError, match="does not hold a state dict"):
        load(tmp_path / "list.pth")


def test_head_must_be_linear():
    with pytest.raises(UserError, match="not a Linear layer"):
        Network(mobilenet_v2(num_classes=3), "classifier.0").with_new_head(4, seed=0)


def test_fingerprint_sees_values_and_names():
    state = small_state()
    changed = dict(state, **{"fc.bias": state["fc.bias"] + 1e-3})
    renamed = {("x" + name if name == "fc.bias" else name): value for name, value in state.items()}
    assert len({fingerprint(state), fingerprint(changed), fingerprint(renamed)}) == 3
