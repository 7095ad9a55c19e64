"""Optimizers and schedules: depths of a network, groups of parameters, clipping, label smoothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from delta_transfer.cli.compose import compose_config
from delta_transfer.common.errors import UserError
from delta_transfer.common.options import OptionError
from delta_transfer.engine.config import check_choices
from delta_transfer.engine.layer_decay import depths_below_head
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import (
    AdamWConfig,
    ScheduleConfig,
    SGDConfig,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from delta_transfer.engine.tasks import TASKS, class_weights, refuse_options_of_classes
from delta_transfer.methods import L2
from delta_transfer.methods.base import Batch


def head(*names: str):
    return lambda name: name.startswith(names)


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None)


@pytest.mark.parametrize(
    ("name", "classifier", "blocks", "stem", "last"),
    [
        ("resnet18", "fc.", 8, "bn1.weight", "layer4.1.conv2.weight"),
        ("vit_b_16", "heads.", 12, "encoder.pos_embedding", "encoder.layers.encoder_layer_11.mlp.3.weight"),
        ("convnext_tiny", "classifier.2.", 18, "features.0.0.weight", "features.7.2.layer_scale"),
        ("efficientnet_b0", "classifier.", 16, "features.0.0.weight", "features.7.0.block.3.0.weight"),
        ("swin_t", "head.", 12, "features.0.0.weight", "features.7.1.mlp.3.weight"),
    ],
)
def test_each_block_has_a_depth_and_the_stem_the_largest_distance(name, classifier, blocks, stem, last):
    model = on_meta(name)
    distances = depths_below_head(model, head(classifier))
    names = {name for name, _ in model.named_parameters() if not name.startswith(classifier)}
    assert distances.keys() == names
    assert distances[stem] == blocks + 1 and distances[last] == 1
    assert set(distances.values()) - {0} == set(range(1, blocks + 2))
    in_order = [distances[name] for name, _ in model.named_parameters() if name in distances]
    assert in_order == sorted(in_order, reverse=True)


def test_layers_between_blocks_go_with_the_block_behind_and_a_final_norm_with_the_head():
    distances = depths_below_head(on_meta("convnext_tiny"), head("classifier.2."))
    assert distances["features.2.1.weight"] == distances["features.3.0.layer_scale"]
    assert distances["classifier.0.weight"] == 0
    assert depths_below_head(on_meta("vit_b_16"), head("heads."))["encoder.ln.weight"] == 0


def test_without_blocks_each_layer_is_a_depth():
    distances = depths_below_head(on_meta("vgg11_bn"), head("classifier.6."))
    convolutions = [name for name in distances if name.endswith("weight") and name.startswith("features.0")]
    assert distances[convolutions[0]] == 10 and distances["classifier.3.weight"] == 1


def test_timms_depths_are_those_of_its_own_layer_decay():
    timm = pytest.importorskip("timm")
    from timm.models._manipulate import group_parameters

    with torch.device("meta"):
        models = [timm.create_model(name) for name in ("convnext_atto", "vit_tiny_patch16_224", "resnet18")]
    for model in models:
        theirs = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        last = max(theirs.values())
        classifier = model.default_cfg["classifier"] + "."
        ours = depths_below_head(model, head(classifier))
        blocks = {name for name in ours if not name.startswith(("norm.", "head."))}  # ViT: a norm behind the blocks
        assert {name: ours[name] for name in blocks} == {name: last - theirs[name] for name in blocks}


def rates(optimizer: torch.optim.Optimizer, target) -> dict[str, float]:
    names = {p: name for name, p in target.traced.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def optimizer_of(target, schedule: ScheduleConfig, config=None, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    return make_optimizer(target, L2(weight_decay), config or SGDConfig(), schedule)


def test_layer_decay_multiplies_the_rate_once_for_each_depth(tiny_source):
    target = tiny_source.with_new_head(3, seed=0).requires_grad_(True)
    schedule = ScheduleConfig(iterations=1, lr=1.0, layer_decay=0.5, backbone_lr_factor=0.1)
    optimizer = optimizer_of(target, schedule)
    set_learning_rate(optimizer, 2.0)
    distances = depths_below_head(target.model, target.is_head)
    found = rates(optimizer, target)
    assert found["fc.weight"] == found["fc.bias"] == 2.0
    assert {name: found[name] for name in distances} == {n: 2.0 * 0.1 * 0.5**d for n, d in distances.items()}
    assert len(set(distances.values())) > 1
    assert len(optimizer_of(target, ScheduleConfig(iterations=1)).param_groups) == 2  # head and backbone, as before


def test_weight_decay_can_leave_vectors_alone(tiny_source):
    target = tiny_source.with_new_head(3, seed=0).requires_grad_(True)
    schedule = ScheduleConfig(iterations=1, layer_decay=0.5)
    optimizer = optimizer_of(target, schedule, AdamWConfig(decay_vectors=False))
    of = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {p.dim() for p, decay in of.items() if decay == 0} == {1}
    assert {p.dim() for p, decay in of.items() if decay == 0.1} == {2, 4}
    assert of.keys() == set(target.parameters())


def test_the_gradient_is_clipped_and_its_whole_norm_is_logged(tiny_source):
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    moved, norms = {}, {}
    for clip in (None, 1e-3, 1e6):
        target = tiny_source.with_new_head(3, seed=0).requires_grad_(True).train()
        optimizer = optimizer_of(target, ScheduleConfig(iterations=1, lr=1.0), SGDConfig(momentum=0.0), weight_decay=0)
        before = {name: p.detach().clone() for name, p in target.traced.named_parameters()}
        state = TrainState(target, None, optimizer, "fp32", clip_norm=clip)
        _, _, extra = train_step(state, L2(0.0), Batch(images, labels))
        norms[clip] = extra["gradient_norm"].item()
        change = [p.detach() - before[name] for name, p in target.traced.named_parameters()]
        moved[clip] = torch.nn.utils.get_total_norm(change).item()
    assert norms[None] == norms[1e-3] == norms[1e6] > 1e-3
    assert moved[None] == pytest.approx(norms[None], rel=1e-4) == moved[1e6]
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)


def test_the_rate_can_fall_once_for_each_pass_over_the_images():
    schedule = ScheduleConfig(
        iterations=10, batch_size=4, lr=1.0, decay="exponential", decay_at=0.5, decay_per_epoch=True
    )
    found = [learning_rate(schedule, step, 10, images=10) for step in range(10)]
    begins = [0, 0, 0, 2.5, 2.5, 5, 5, 5, 7.5, 7.5]  # the step at which the pass of each step's first image began
    assert found == pytest.approx([0.1 ** (begin / 5) for begin in begins])
    in_each = [learning_rate(schedule.replace(decay_per_epoch=False), step, 10, images=10) for step in range(10)]
    assert in_each == pytest.approx([0.1 ** (step / 5) for step in range(10)])


@pytest.fixture(scope="module")
def modern():
    return compose_config("config", ["schedule=modern", "reg=l2", "experiment/values=modern_l2"])


def test_the_modern_recipe(modern):
    schedule, optimizer = modern.schedule, modern.optimizer
    assert (optimizer.name, optimizer.decay_vectors, modern.reg.weight_decay) == ("adamw", False, 0.05)
    assert (schedule.lr, schedule.warmup, schedule.decay) == (2.5e-4, 0.05, "cosine")
    assert (schedule.layer_decay, schedule.label_smoothing) == (0.75, 0.1)


def test_labels_are_smoothed_in_the_loss_of_a_run(modern):
    logits, labels = torch.randn(4, 5), torch.tensor([0, 3, 1, 4])
    smooth = 0.9 * F.one_hot(labels, 5) + 0.1 / 5
    expected = -(smooth * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert torch.allclose(TASKS[modern.task].loss(modern)(logits, labels), expected)
    plain = modern.replace(schedule=modern.schedule.replace(label_smoothing=0.0))
    assert TASKS[plain.task].loss(plain) is F.cross_entropy


def test_balanced_weights_make_every_class_count_the_same(modern):
    """Six, three and one image of the training split, and a class that it lacks."""
    config = modern.replace(schedule=modern.schedule.replace(label_smoothing=0.0, class_weights="balanced"))
    dataset = SimpleNamespace(labels=np.array([0] * 6 + [1] * 3 + [2] + [3] * 5), classes=list("abcd"))
    weights = class_weights(config, dataset, np.arange(10), torch.device("cpu"))
    torch.testing.assert_close(weights[:3], torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    labels, logits = torch.tensor(dataset.labels[:10]), torch.randn(10, 4)
    each = F.cross_entropy(logits, labels, reduction="none")
    of_classes = torch.stack([each[labels == label].mean() for label in range(3)])
    loss = TASKS[config.task].loss(config, weights)
    torch.testing.assert_close(loss(logits, labels), of_classes.mean())
    halves = [loss(logits[part], labels[part]) for part in (slice(5), slice(5, 10))]
    torch.testing.assert_close(sum(halves) / 2, of_classes.mean())  # micro-batches change nothing
    assert class_weights(modern, dataset, np.arange(10), torch.device("cpu")) is None


@pytest.mark.parametrize("name", ["class_weights", "label_smoothing"])
def test_options_of_classes_are_refused_for_other_losses(modern, name):
    schedule = modern.schedule.replace(**{"label_smoothing": 0.0} | {name: "balanced" if name[0] == "c" else 0.1})
    with pytest.raises(OptionError) as refused:
        refuse_options_of_classes(modern.replace(schedule=schedule))
    assert refused.value.key == f"schedule.{name}"


@pytest.mark.parametrize("change", [{"clip_norm": 1.0}, {"decay_vectors": False}])
def test_steps_that_a_method_computes_itself_must_be_plain_ones(change):
    config = compose_config("config", ["reg=l2t_ww"])
    group = "schedule" if "clip_norm" in change else "optimizer"
    changed = config.replace(**{group: getattr(config, group).replace(**change)})
    check_choices(config, config.reg.build().stages())
    with pytest.raises(UserError):
        check_choices(changed, changed.reg.build().stages())
