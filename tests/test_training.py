"""The loop: learning rate, hooks, lines of metrics, checkpoints, the frozen source, precision."""

from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from delta_transfer.data.loader import Loader
from delta_transfer.data.store import Store
from delta_transfer.engine import loop, tasks
from delta_transfer.engine.callbacks import Callback, Checkpoints, OnLine, Progress
from delta_transfer.engine.loop import TrainState, train
from delta_transfer.engine.optimizers import (
    AdamWConfig,
    OptimizerConfig,
    ScheduleConfig,
    SGDConfig,
    learning_rate,
    make_optimizer,
)
from delta_transfer.engine.tasks import NotFinite, evaluate
from delta_transfer.methods import DELTA, L2, L2FE, L2SP, AFAChannel, AFASpatial, DELTAWithoutAttention, Regularizer
from delta_transfer.methods.base import Needs
from delta_transfer.models import Network, frozen_maps


@pytest.fixture
def loader() -> Loader:
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 3
    store = rng.integers(0, 100, (24, 10, 10, 3)) + 60 * labels[:, None, None, None]
    return Loader(
        Store(store.astype(np.uint8).reshape(-1, 3), np.full((24, 2), 10)),
        labels,
        crop=8,
        mirror=True,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        batch_size=8,
        seed=0,
        device=torch.device("cpu"),
    )


def learn(
    source: Network,
    loader: Loader,
    method: Regularizer,
    precision: str = "fp32",
    compiled: bool = False,
    accumulate: int = 1,
    optimizer: OptimizerConfig | None = None,
    step: loop.Step = loop.train_step,
    **schedule,
) -> tuple[Network, list[dict]]:
    """Trains a target on all images; returns it and the lines of metrics."""
    method.loss_scale = accumulate
    schedule = ScheduleConfig(**({"iterations": 6, "batch_size": 8, "lr": 0.05, "log_every": 2} | schedule))
    target = source.with_new_head(3, seed=0).requires_grad_(True)
    torch.manual_seed(0)
    method.setup(target, source.map_shapes(8, 8, training=True))
    optimizer = make_optimizer(target, method, optimizer or SGDConfig(), schedule)
    maps = frozen_maps(source, precision=precision) if method.needs.source else None
    state = TrainState(target, maps, optimizer, precision, compiled=compiled, accumulate=accumulate)
    lines = []
    train(state, method, loader, np.arange(24), schedule, Progress.beginning(), [OnLine(lines.append)], step=step)
    return target, lines


def test_learning_rate_falls_once():
    schedule = ScheduleConfig(iterations=9, lr=0.01, decay_at=2 / 3)
    rates = [learning_rate(schedule, i, 9) for i in range(9)]
    assert rates == [0.01] * 6 + [pytest.approx(0.001)] * 3


def test_learning_rate_falls_again():
    schedule = ScheduleConfig(iterations=8, lr=0.1, decay_at=0.5, decay_also_at=[0.75])
    rates = [learning_rate(schedule, i, 8) for i in range(8)]
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_learning_rate_along_a_cosine():
    """torch's CosineAnnealingLR, stepped in every iteration."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    schedule = ScheduleConfig(iterations=20, lr=0.1, decay="cosine")
    for iteration in range(20):
        assert learning_rate(schedule, iteration, 20) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_learning_rate_along_an_exponential():
    """It reaches the factor at decay_at."""
    schedule = ScheduleConfig(iterations=8, lr=0.1, decay="exponential", decay_at=0.5, decay_factor=0.01)
    rates = [learning_rate(schedule, i, 8) for i in (0, 2, 4, 6)]
    assert rates == pytest.approx([0.1, 0.01, 0.001, 0.0001])


def test_the_learning_rate_rises_in_the_warm_up():
    schedule = ScheduleConfig(iterations=8, lr=0.1, warmup=0.5, decay_at=1.0)
    rates = [learning_rate(schedule, i, 8) for i in range(8)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1] + [0.1] * 4)


def test_the_backbone_learns_at_a_fraction_of_the_heads_rate(tiny_source, loader):
    start = tiny_source.with_new_head(3, seed=0).weights()

    def steps(factor: float) -> dict[str, torch.Tensor]:
        """How far one step without momentum moves each parameter."""
        options = {"iterations": 1, "optimizer": SGDConfig(momentum=0.0), "backbone_lr_factor": factor}
        target, _ = learn(tiny_source, loader, L2(), **options)
        return {name: p.detach() - start[name] for name, p in target.traced.named_parameters()}

    full, tenth = steps(1.0), steps(0.1)
    assert all(step.abs().max() > 0 for step in full.values())
    for name, step in tenth.items():
        torch.testing.assert_close(step, full[name] * (1.0 if name.startswith("fc") else 0.1), rtol=1e-3, atol=1e-6)


def test_nesterov_reaches_the_optimizer(tiny_source, loader):
    plain, nesterov = (
        learn(tiny_source, loader, L2(), optimizer=SGDConfig(nesterov=n))[1][-1]["loss"] for n in (False, True)
    )
    assert plain != nesterov


def test_adamw_is_torchs(tiny_source, loader):
    config = AdamWConfig(beta1=0.5, beta2=0.6, eps=1e-3)
    target = tiny_source.with_new_head(3, seed=0).requires_grad_(True)
    optimizer = make_optimizer(target, L2(weight_decay=0.25), config, ScheduleConfig(iterations=1, lr=0.5))
    assert type(optimizer) is torch.optim.AdamW
    found = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert found == {"lr": 0.5, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.25}
    _, lines = learn(tiny_source, loader, L2(), optimizer=AdamWConfig(), lr=0.001, iterations=30)
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"]


def test_of_several_crops_the_mean_of_the_logits_counts(tiny_source, loader):
    loader.ten_crops = True
    images = torch.cat([images for images, _ in loader.test_batches(np.arange(24))])
    with torch.no_grad():
        expected = tiny_source(images)["logits"].view(24, 10, -1).mean(dim=1)
    torch.testing.assert_close(torch.from_numpy(evaluate(tiny_source, loader, np.arange(24))["logits"]), expected)


def test_log_lines(tiny_source, loader):
    _, lines = learn(tiny_source, loader, DELTAWithoutAttention(alpha=0.01, beta=0.01), iterations=5)
    assert [line["step"] for line in lines] == [2, 4, 5]  # the last step is always logged
    for line in lines:
        terms = line["cross_entropy"] + line["feature_maps"] + line["head"]
        assert line["loss"] == pytest.approx(terms, rel=1e-6)
        assert 0 <= line["train_top1"] <= 100 and line["images_per_second"] > 0


def test_the_balanced_accuracy_is_the_mean_over_classes_with_images(monkeypatch):
    logits, labels = torch.eye(4)[[0, 0, 1, 3]], torch.tensor([0, 0, 0, 3])
    monkeypatch.setattr(tasks, "outputs_of", lambda *_: (logits, labels))
    found = evaluate(None, None, np.arange(4))
    assert (found["top1"], found["balanced_accuracy"]) == (75, pytest.approx(100 * (2 / 3 + 1) / 2))


def test_it_learns(tiny_source, loader):
    target, lines = learn(tiny_source, loader, L2(), iterations=100)
    assert lines[-1]["cross_entropy"] < 0.5 * lines[0]["cross_entropy"]
    assert evaluate(target, loader, np.arange(24))["top1"] > 60


def spatial() -> AFASpatial:
    return AFASpatial(alpha=0.01)


def channel() -> AFAChannel:
    return AFAChannel(alpha=0.01)


def fitted_delta() -> DELTA:
    delta = DELTA()
    delta.load_fitted({"conv1": torch.arange(5.0), "conv2": torch.arange(5.0)})
    return delta


@pytest.mark.parametrize("method", [DELTAWithoutAttention, fitted_delta])
def test_source_is_bit_identical_after_training(tiny_source, loader, method):
    before = {name: value.clone() for name, value in tiny_source.weights().items()}
    target, _ = learn(tiny_source, loader, method())
    assert all(torch.equal(value, before[name]) for name, value in tiny_source.weights().items())
    assert not torch.equal(target.weights()["bn1.running_mean"], before["bn1.running_mean"])


def test_stronger_penalties_keep_closer(tiny_source, loader):
    """alpha has the direction it should have, for weights and for feature maps."""
    start = tiny_source.backbone_parameters()

    def distance(target) -> float:
        return sum((p - start[name]).square().sum().item() for name, p in target.backbone_parameters().items())

    def map_distance(target) -> float:
        images, _ = loader.train_batch(np.arange(24), 0)
        with torch.no_grad():
            ours, theirs = target.eval()(images), tiny_source(images)
        return sum((ours[tap] - theirs[tap]).square().mean().item() for tap in target.taps)

    weak, strong = (learn(tiny_source, loader, L2SP(alpha=a, beta=0.0), iterations=30)[0] for a in (0.0, 2.0))
    assert distance(strong) < 0.5 * distance(weak)
    weak, strong = (
        learn(tiny_source, loader, DELTAWithoutAttention(alpha=a, beta=0.0), iterations=30)[0] for a in (0.0, 0.1)
    )
    assert map_distance(strong) < 0.5 * map_distance(weak)


def test_parameters_of_a_method_are_trained_too(tiny_source, loader):
    class Learnt(Regularizer):
        def __init__(self):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(1.0))

        def penalty(self, target, outputs, source_outputs):
            return {"value": self.value.square()}

    method = Learnt()
    learn(tiny_source, loader, method)
    assert abs(method.value.item()) < 1


def test_bf16_keeps_penalties_in_full_precision(tiny_source, loader):
    seen = {}

    class Spy(DELTAWithoutAttention):
        def penalty(self, target, outputs, source_outputs):
            terms = super().penalty(target, outputs, source_outputs)
            seen.update(map=outputs[target.taps[0]].dtype, term=terms["feature_maps"].dtype)
            return terms

    _, half = learn(tiny_source, loader, Spy(), precision="bf16")
    assert seen == {"map": torch.bfloat16, "term": torch.float32}
    _, full = learn(tiny_source, loader, DELTAWithoutAttention())
    assert half[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=0.05)


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        # What compile=true takes; the others need no C++ compiler, which takes half a minute.
        pytest.param(DELTAWithoutAttention, "inductor", marks=pytest.mark.slow),
        *(pytest.param(method, "aot_eager", marks=pytest.mark.slow) for method in (L2SP, spatial)),
        *((method, "aot_eager") for method in (L2FE, channel)),
    ],
)
def test_compiled_networks_train_the_same(tiny_source, loader, method, backend, monkeypatch):
    _, eager = learn(tiny_source, loader, method())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    _, compiled = learn(tiny_source, loader, method(), compiled=True)
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in eager], rel=1e-5)


class WithoutBatchNorm(nn.Module):
    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
        self.fc = nn.Linear(5, num_classes)

    def forward(self, images):
        return self.fc(self.conv2(self.conv1(images).relu()).relu().mean(dim=(2, 3)))


@pytest.mark.parametrize("method", [L2, L2FE, L2SP, DELTAWithoutAttention, fitted_delta, spatial, channel])
def test_an_accumulated_batch_is_the_whole_batch_but_for_batchnorm(method, tiny_source, loader):
    def trained(source: Network, accumulate: int) -> tuple[dict, list[dict]]:
        made = method()
        made.beta = 0.1
        if hasattr(made, "alpha"):
            made.alpha = 0.1
        target, lines = learn(source, loader, made, accumulate=accumulate)
        return target.weights(), [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]

    torch.manual_seed(0)
    source = Network(WithoutBatchNorm(), head="fc", taps=("conv1", "conv2")).freeze()
    whole, lines = trained(source, 1)
    for accumulate in (2, 4):
        accumulated, accumulated_lines = trained(source, accumulate)
        for name, value in whole.items():
            torch.testing.assert_close(accumulated[name], value, rtol=1e-4, atol=1e-6)
        assert accumulated_lines == [pytest.approx(line, rel=1e-4, abs=1e-6) for line in lines]
    with_batchnorm = [trained(tiny_source, accumulate)[1][-1]["loss"] for accumulate in (1, 4)]
    assert (with_batchnorm[0] == pytest.approx(with_batchnorm[1], rel=1e-5)) == (method is L2FE)  # which freezes it


def test_the_gradient_norm_is_logged(tiny_source, loader, monkeypatch):
    norms = []
    step = torch.optim.SGD.step

    def spy(optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(sum(g.double().square().sum().item() for g in gradients) ** 0.5)
        return step(optimizer)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    _, lines = learn(tiny_source, loader, L2())
    assert [line["gradient_norm"] for line in lines] == pytest.approx(np.reshape(norms, (3, 2)).mean(axis=1), rel=1e-5)


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (0.0, [11, 22, 33, 44, 55, 60]),  # every ten seconds, as asked for, and before the last evaluation
        (0.205, [11, 32, 53]),  # one of 0.2 s a hundred times as long apart, so that they take 1 %
        (3.0, [11]),
    ],
)
def test_checkpoints_are_made_as_often_as_asked_unless_that_takes_long(
    tiny_source, loader, monkeypatch, cost, expected
):
    """The clock moves by a second per step of training, and by `cost` per checkpoint."""
    now, made = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    schedule = ScheduleConfig(iterations=60, batch_size=8, log_every=7)
    target, method = tiny_source.with_new_head(3, seed=0).requires_grad_(True), L2()
    state = TrainState(target, None, make_optimizer(target, method, SGDConfig(), schedule), "fp32")

    def step(*_):
        now[0] += 1
        return torch.zeros(8, 3), {"cross_entropy": torch.zeros(())}, {}  # logits, losses, extra metrics

    def save(progress: Progress) -> None:
        made.append(progress.iterations_done)
        now[0] += cost

    train(state, method, loader, np.arange(24), schedule, Progress.beginning(), [Checkpoints(10, save)], step=step)
    assert made == expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_hooks_of_a_method_are_called_in_their_order(tiny_source, loader, accumulate):
    class Told(Regularizer):
        needs = Needs(source=True, views=2, micro_batches_again=True)
        told: ClassVar[list] = []

        def before_step(self, state, step, steps, seed):
            self.told.append((step, steps))

        def penalty(self, target, outputs, source_outputs):
            self.told.append((len(outputs["labels"]), len(outputs["view_2"]), len(source_outputs["conv1"])))
            self.extra_metrics = {"attention_mean": outputs["logits"].detach().mean()}
            return super().penalty(target, outputs, source_outputs)

        def after_step(self, state, micro_batches, source_outputs):
            self.told.append([len(batch.labels) for batch in micro_batches])
            assert len(source_outputs) == len(micro_batches)
            assert all(p.grad is None for p in state.target.parameters())  # the step is done
            return {"attention_after": torch.ones(())}

    _, lines = learn(tiny_source, loader, Told(), accumulate=accumulate, iterations=2, log_every=1)
    images = 8 // accumulate
    one_step = [*[(images, images, images)] * accumulate, [images] * accumulate]
    assert Told.told == [(0, 2), *one_step, (1, 2), *one_step]
    assert all({"attention_mean", "attention_after"} <= line.keys() for line in lines)
    assert lines[0]["loss"] == lines[0]["cross_entropy"]  # extra metrics are no part of it


@pytest.mark.parametrize("stopped", [3, 5])
def test_a_training_goes_on_from_its_progress(tiny_source, loader, stopped):
    """Lines of metrics, iterations and losses are those of a training that was not stopped."""
    schedule = ScheduleConfig(iterations=8, batch_size=8, log_every=3)

    def training() -> tuple[TrainState, L2]:
        target, method = tiny_source.with_new_head(3, seed=0).requires_grad_(True), L2()
        return TrainState(target, None, make_optimizer(target, method, SGDConfig(), schedule), "fp32"), method

    class Stop(Callback):
        def on_step(self, at):
            if at.done == stopped:
                saved.append((at.progress(), deepcopy(state.target.state_dict()), deepcopy(optimizer.state_dict())))
                raise InterruptedError

    def lines_of(state, method, progress, *callbacks) -> list[dict]:
        lines: list[dict] = []
        with suppress(InterruptedError):
            train(
                *(state, method, loader, np.arange(24), schedule, progress),
                [OnLine(lines.append), *callbacks],
                labels={"stage": 2},
            )
        return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]

    whole = lines_of(*training(), Progress.beginning(8))
    assert [(line["step"], line["stage"]) for line in whole] == [(9, 2), (12, 2), (15, 2), (16, 2)]
    saved: list = []
    state, method = training()
    optimizer, stopped = state.optimizer, stopped + 8
    before = lines_of(state, method, Progress.beginning(8), Stop())
    ((progress, weights, momentum),) = saved
    state, method = training()
    state.target.load_state_dict(weights)
    state.optimizer.load_state_dict(momentum)
    assert before + lines_of(state, method, progress) == whole


def test_dropout_follows_from_seed_and_iteration(loader):
    """They depend neither on earlier work in the process nor on the place where a resumed run starts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(5, 3))
    source = Network(model, head="4").freeze()
    first = learn(source, loader, L2())[1]
    torch.rand(7)
    assert [line["loss"] for line in learn(source, loader, L2())[1]] == [line["loss"] for line in first]
    loader.step_seed = lambda iteration: 0  # other masks
    assert learn(source, loader, L2())[1][-1]["loss"] != first[-1]["loss"]


def test_auxiliary_loss_is_weighted(tiny_source):
    outputs = {"logits": torch.randn(4, 3), "aux_logits": torch.randn(4, 3)}
    labels = torch.tensor([0, 1, 2, 0])
    terms = TrainState(tiny_source, None, None, "fp32", aux_weight=0.4).task_loss(outputs, labels)
    assert terms["cross_entropy"] == F.cross_entropy(outputs["logits"], labels)
    assert terms["aux"] == 0.4 * F.cross_entropy(outputs["aux_logits"], labels)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_loss_that_is_not_finite_names_term_and_iteration(tiny_source, loader, value, word):
    class Breaks(Regularizer):
        calls = 0

        def penalty(self, target, outputs, source_outputs):
            self.calls += 1
            return {"broken": outputs["logits"].sum() * 0 + (value if self.calls == 4 else 1.0)}

    # The rate is that of the iteration. At the line of metrics that notices it, the rate has fallen.
    with pytest.raises(NotFinite, match=rf"'broken' became {word} at iteration 3 \(learning rate 0.05\)") as error:
        learn(tiny_source, loader, Breaks(), iterations=6, log_every=6)
    assert (error.value.iteration, error.value.steps) == (3, 3)
