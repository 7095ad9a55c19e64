"""The methods against numbers that their authors' code gave on the same tensors, in float64.

tests/golden/authors.json holds those numbers; nothing else here comes from the authors' code. Weights, images, labels
and draws are of numpy's RandomState, whose stream is frozen. `reduced` explains how numbers stand for tensors.

Left out because they differ for a reason: BatchNorm's statistics of L2T-ww, which the authors update twice in a step,
and StochNorm's gradient, which the authors compute from moving statistics that the forward pass has already updated.
`probe_training` is the authors' probe with BatchNorm in evaluation mode.
"""

import json
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import delta_transfer as dt
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import ScheduleConfig, SGDConfig, make_optimizer
from delta_transfer.methods.attention import train_probe
from delta_transfer.methods.base import Batch
from delta_transfer.methods.matching import joined

GOLDEN = json.loads((Path(__file__).parent / "golden" / "authors.json").read_text())
LIMIT = 1e-5  # of a relative difference


@pytest.fixture(autouse=True)
def double_precision():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


# --- the setup ---


def draw(name: str, shape, kind: str = "normal") -> Tensor:
    """Random numbers with a stream for each name, so that the order of parameters does not matter."""
    random = np.random.RandomState(zlib.crc32(name.encode()) % 2**31)
    values = random.standard_normal(shape) if kind == "normal" else random.random_sample(shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Mini(nn.Module):
    """A residual network of four stages of two blocks; parameter names as torchvision's resnet18."""

    def __init__(self, widths=(6, 8, 10, 12), classes: int = 7):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        for i, after in enumerate(widths):
            stage = nn.Sequential(Block(before, after, 1 if i == 0 else 2), Block(after, after, 1))
            self.add_module(f"layer{i + 1}", stage)
            before = after
        self.fc = nn.Linear(before, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


@torch.no_grad()
def fill(model: nn.Module, name: str, around: nn.Module | None = None, spread: float = 0.05) -> nn.Module:
    """Weights and BatchNorm's statistics; with `around`: its own, each moved by about `spread` of its size."""
    model.double()
    at = dict(around.state_dict()) if around is not None else {}
    modules = dict(model.named_modules())
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        module, _, leaf = key.rpartition(".")
        normal = draw(f"{name}:{key}", value.shape)
        fan_in = value[0].numel() if value.dim() > 1 else 1
        if isinstance(modules[module], nn.BatchNorm2d):
            positive = 0.5 + draw(f"{name}:{key}", value.shape, "uniform")
            new = positive if leaf in ("weight", "running_var") else 0.1 * normal
        else:
            new = normal * (2 / fan_in) ** 0.5 if value.dim() > 1 else 0.1 * normal
        if key in at and at[key].shape == value.shape and not key.startswith("fc."):
            new = at[key] * (1 + spread * draw(f"{name}:{key}:move", value.shape))
            new = new + 0.01 * normal if leaf != "running_var" else new
        value.copy_(new)
    return model


class Setup:
    def __init__(self, side: int = 48, batch: int = 6, classes: int = 5):
        self.side, self.batch, self.classes = side, batch, classes
        self.taps = [f"layer{i}.1.conv2" for i in (1, 2, 3, 4)]
        self.source_classes = 7

    def new(self, classes: int, widths=(6, 8, 10, 12)) -> nn.Module:
        return Mini(widths, classes)

    def source_model(self) -> nn.Module:
        return fill(self.new(self.source_classes), "source")

    def target_model(self) -> nn.Module:
        return fill(self.new(self.classes), "target", around=self.source_model())

    def images(self, name: str, count: int | None = None) -> Tensor:
        return draw(f"images:{name}", (count or self.batch, 3, self.side, self.side))

    def labels(self, name: str, count: int | None = None) -> Tensor:
        return (draw(f"labels:{name}", (count or self.batch,), "uniform") * self.classes).long()

    def networks(self, taps=None):
        taps = self.taps if taps is None else taps
        source = dt.tapped(self.source_model(), head="fc", taps=taps).freeze()
        target = dt.tapped(self.target_model(), head="fc", taps=taps).train()
        return source, target


def gradients(loss: Tensor, named) -> dict[str, Tensor]:
    named = dict(named)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def copies(named) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in dict(named).items()}


# --- the methods: each returns {quantity: scalar, tensor, or {name: tensor}} ---
# Strengths are all 1 where the authors' functions have none.

ALPHA, BETA = 0.3, 0.7


def l2_sp(s: Setup) -> dict:
    source, target = s.networks()
    method = dt.L2SP(alpha=ALPHA, beta=BETA)
    fresh = dt.tapped(source.model, head="fc", taps=s.taps)
    method.setup(fresh)  # while the backbone is the source's
    terms = method.penalty(target, {}, None)
    total = sum(terms.values())
    return {
        "weights": terms["weights"],
        "head": terms["head"],
        "gradient": gradients(total, target.traced.named_parameters()),
    }


def l2_sp_conv(s: Setup) -> dict:
    """The L2-SP authors' code, without the head's term, which they have without the bias."""
    source, target = s.networks()
    method = dt.L2SP(alpha=ALPHA, beta=0.0, scope="conv")
    method.setup(dt.tapped(source.model, head="fc", taps=s.taps))
    weights = method.penalty(target, {}, None)["weights"]
    return {"weights": weights, "gradient": gradients(weights, target.backbone_parameters())}


def fisher_of(s: Setup) -> dict[str, Tensor]:
    model = s.source_model()
    return {n: draw(f"fisher:{n}", p.shape).square() for n, p in model.named_parameters() if p.dim() == 4}


def l2_sp_fisher(s: Setup, form: str, eps: float) -> dict:
    source, target = s.networks()
    method = dt.L2SPFisher(alpha=ALPHA, beta=0.0, form=form, eps=eps)
    method.load_fitted(fisher_of(s))
    method.setup(dt.tapped(source.model, head="fc", taps=s.taps))
    weights = method.penalty(target, {}, None)["weights"]
    return {"weights": weights, "gradient": gradients(weights, target.backbone_parameters())}


def l2_sp_fisher_add(s: Setup) -> dict:
    return l2_sp_fisher(s, "add", 0.01)


def l2_sp_fisher_min(s: Setup) -> dict:
    return l2_sp_fisher(s, "min", 0.5)


def penalised(s: Setup, method) -> dict:
    source, target = s.networks()
    images = s.images("batch")
    outputs = target(images)
    with torch.no_grad():
        source_outputs = source(images)
    terms = method.penalty(target, outputs, source_outputs)
    total = sum(terms.values())
    return {"feature_maps": terms["feature_maps"], "head": terms["head"]} | {
        "gradient": gradients(total, target.traced.named_parameters())
    }


def delta_noatt(s: Setup) -> dict:
    return penalised(s, dt.DELTAWithoutAttention(alpha=ALPHA, beta=BETA, normalize=False))


def given_importance(s: Setup) -> dict[str, Tensor]:
    source, _ = s.networks()
    shapes = source.map_shapes_on(s.images("batch")[:1])
    return {tap: draw(f"importance:{tap}", (shapes[tap][0],)) * 1e-3 for tap in s.taps}


def delta_given(s: Setup) -> dict:
    """DELTA with given importances; the authors round the weights to fp32."""
    method = dt.DELTA(alpha=ALPHA, beta=BETA)
    method.load_fitted(given_importance(s))
    return penalised(s, method)


def probe_model(s: Setup) -> nn.Module:
    """A probe: the source with a head for the task."""
    return fill(s.new(s.classes), "probe", around=s.source_model(), spread=0.0)


def probe_batches(s: Setup) -> list[tuple[Tensor, Tensor]]:
    return [(s.images(f"probe{i}"), s.labels(f"probe{i}")) for i in range(4)]


def channel_attention(s: Setup) -> dict:
    probe = dt.tapped(probe_model(s), head="fc", taps=s.taps)
    options = dt.AttentionConfig(images=4 * s.batch)
    result = dt.channel_attention(probe, probe_batches(s), None, options)
    return {
        # Not through `importance`, which is fp32 as it is stored.
        "importance": {tap: rises.double().mean(dim=0) for tap, rises in result.rises.items()},
        "weights": {tap: w.double() for tap, w in result.weights.items()},
    }


def probe_training(s: Setup) -> dict:
    """The probe's head after its training, in the authors' learning rates, with BatchNorm in evaluation mode."""
    source = dt.tapped(probe_model(s), head="fc", taps=s.taps).freeze()
    batches, options = probe_batches(s), dt.AttentionConfig()
    keep = type(source).with_new_head
    type(source).with_new_head = lambda self, classes, seed, layer=None: self.copy()  # from the head that is given
    try:
        probe = train_probe(source, batches, s.classes, options)
    finally:
        type(source).with_new_head = keep
    return {"head": copies(probe.head_parameters())}


def delta_steps(s: Setup) -> dict:
    """Three steps of the training loop with DELTA: weights, momentum and BatchNorm's statistics."""
    source, target = s.networks()
    method = dt.DELTA(alpha=0.01, beta=0.01)
    method.load_fitted(given_importance(s))
    state = exact_state(target, source, method, lr=0.01)
    losses = []
    for i in range(3):
        _, terms, _ = train_step(state, method, Batch(s.images(f"step{i}"), s.labels(f"step{i}")))
        losses.append(sum(terms.values()))
    return {"losses": torch.stack(losses)} | values_of(target, state)


class Exact(TrainState):
    """The training loop's, whose cross-entropy is in fp32, in float64."""

    def task_loss(self, outputs, labels):
        return {"cross_entropy": F.cross_entropy(outputs["logits"], labels)}


def exact_state(target, source, method, lr: float) -> Exact:
    schedule = ScheduleConfig(iterations=9, batch_size=4, lr=lr)
    return Exact(target, source, make_optimizer(target, method, SGDConfig(), schedule), "fp32")


def values_of(target, state) -> dict:
    named = dict(target.traced.named_parameters())
    momentum = {n: state.optimizer.state[p]["momentum_buffer"].clone() for n, p in named.items()}
    statistics = {n: b.clone() for n, b in target.traced.named_buffers() if b.is_floating_point()}
    return {"parameters": copies(named), "momentum": momentum, "statistics": statistics}


def set_attention(method) -> None:
    with torch.no_grad():
        for name, p in method.modules_by_tap.named_parameters():
            p.copy_(draw(f"afa:{name}", p.shape) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 10))


def afa(s: Setup, kind) -> dict:
    source, target = s.networks()
    images = s.images("batch")
    method = kind(alpha=ALPHA, beta=BETA).double()
    method.setup(target, target.map_shapes_on(images))
    method.double()
    set_attention(method)
    outputs = target(images)
    with torch.no_grad():
        source_outputs = source(images)
    terms = method.penalty(target, outputs, source_outputs)
    total = sum(terms.values())
    weights = {tap: method.weights(tap, source_outputs[tap]).detach() for tap in s.taps}
    return {
        "feature_maps": terms["feature_maps"],
        "head": terms["head"],
        "attention": weights,
        "gradient": gradients(total, target.traced.named_parameters()),
        "modules": gradients(total, method.modules_by_tap.named_parameters()),
    }


def afa_spatial(s: Setup) -> dict:
    return afa(s, dt.AFASpatial)


def afa_channel(s: Setup) -> dict:
    return afa(s, dt.AFAChannel)


STAGES = ["layer1", "layer2", "layer3", "layer4"]
# Decays so large that a term of the reverse pass which is left out would be noticed.
L2T = {"alpha": 0.5, "weight_decay": 0.02, "meta_lr": 1e-3, "meta_weight_decay": 0.03, "inner_steps": 2}
L2T_LR = 0.1


def l2t_target_model(s: Setup) -> nn.Module:
    return fill(s.new(s.classes, widths=(8, 12, 16, 20)), "l2t_target")


@torch.no_grad()
def set_l2t(method) -> None:
    for name, p in method.adapters.named_parameters():
        p.copy_(draw(f"matcher:{name}", p.shape) / (p.shape[1] ** 0.5 if p.dim() > 1 else 10))
    for name, p in method.meta_networks.named_parameters():
        # Amounts on both sides of 0 and of 6.
        spread = 3.0 if name.endswith("where.weight") else 0.2
        p.copy_((2.0 if name.endswith("where.bias") else 0.0) + spread * draw(f"meta:{name}", p.shape))


def l2t_networks(s: Setup):
    source = dt.tapped(s.source_model(), head="fc", taps=STAGES).freeze()
    target = dt.tapped(l2t_target_model(s), head="fc", taps=STAGES).train()
    images = s.images("step0")
    method = dt.L2TWW(**L2T)
    method.setup(target, target.map_shapes_on(images), source.map_shapes_on(images))
    method.double()
    set_l2t(method)
    return source, target.train(), method


def l2t_matching(s: Setup) -> dict:
    """M, its gradient with respect to target and adapters, and to the meta-networks, which `penalty` leaves out."""
    source, target, method = l2t_networks(s)
    images = s.images("step0")
    outputs, source_outputs = target(images), source(images)
    made = method.weights(source_outputs)
    source_maps = joined(method.matched, method.source_maps(source_outputs))
    total = method.matching(method.adapters(outputs), source_maps, method.products(made))
    (kept,) = method.penalty(target, outputs, source_outputs).values()
    return {
        "matching": total,
        "as_penalty": kept,
        "what": {key: w.detach() for key, (w, _) in made.items()},
        "where": {key: amount.detach() for key, (_, amount) in made.items()},
        "gradient": gradients(kept, target.traced.named_parameters()),
        "matchers": gradients(kept, method.adapters.named_parameters()),
        "meta": gradients(total, method.meta_networks.named_parameters()),
    }


def l2t_iterations(s: Setup, count: int = 2) -> dict:
    """Meta-iterations on separate batches: the final values of everything that moves, and the last meta-gradient."""
    source, target, method = l2t_networks(s)
    state = exact_state(target, source, method, lr=L2T_LR)
    taken, losses = [], []
    step = method.adam.step

    def noted():
        taken.append({n: p.grad.clone() for n, p in method.meta_networks.named_parameters()})
        step()

    method.adam.step = noted
    for i in range(count):
        _, _, metrics = train_step(state, method, Batch(s.images(f"step{i}"), s.labels(f"step{i}")))
        losses.append(metrics["attention_meta_loss"])
    values = values_of(target, state)
    momentum = state.optimizer.state
    return {
        "meta_losses": torch.stack(losses),
        "first_meta_gradient": taken[0],
        "last_meta_gradient": taken[-1],
        "meta_networks": copies(method.meta_networks.named_parameters()),
        "parameters": values["parameters"],
        "momentum": values["momentum"],
        "matchers": copies(method.adapters.named_parameters()),
        "matchers_momentum": {n: momentum[p]["momentum_buffer"] for n, p in method.adapters.named_parameters()},
    }


def bss(s: Setup) -> dict:
    _, target = s.networks()
    outputs = target(s.images("batch"))
    (term,) = dt.BSS(alpha=ALPHA, k=2).penalty(target, outputs, None).values()
    return {"spectrum": term, "gradient": gradients(term, target.backbone_parameters())}


def co_tuning_data(s: Setup) -> list[tuple[Tensor, Tensor]]:
    """Every class is there."""
    labels = torch.arange(4 * s.batch) % s.classes
    return [(s.images(f"plain{i}"), labels[i * s.batch : (i + 1) * s.batch]) for i in range(4)]


def co_tuning(s: Setup) -> dict:
    source, target = s.networks()
    method = dt.CoTuning(alpha=ALPHA)
    fitted = method.fit(source, co_tuning_data(s), s.classes)
    method.setup(target)
    outputs = target(s.images("batch")) | {"labels": s.labels("batch")}
    (term,) = method.penalty(target, outputs, None).values()
    return {
        "relationship": fitted["relationship"],
        "source_classes": term,
        "gradient": gradients(term, target.backbone_parameters()),
        "source_head": gradients(term, method.head.named_parameters()),
    }


# A queue that goes round, and is shorter than some classes are in one batch.
BI = {"alpha": 1.0, "queue": 2, "temperature": 0.07, "momentum": 0.9, "dimensions": 6}


@torch.no_grad()
def set_bi(method) -> None:
    for name, p in method.projection.named_parameters():
        p.copy_(draw(f"projection:{name}", p.shape) / 3)
    method.key_projection.load_state_dict(method.projection.state_dict())
    for name in ("queue_z", "queue_g"):
        buffer = getattr(method, name)
        buffer.copy_(F.normalize(draw(name, buffer.shape), dim=2))


def bi_tuning(s: Setup, steps: int = 3) -> dict:
    _, target = s.networks()
    method = dt.BiTuning(**BI, weight_decay=0.0)
    method.setup(target)
    set_bi(method)
    trained = dict(target.traced.named_parameters()) | {f"P.{n}": p for n, p in method.projection.named_parameters()}
    images_terms, classes_terms = [], []
    for i in range(steps):
        method.follow(target)
        outputs = target(s.images(f"step{i}")) | {"labels": s.labels(f"step{i}"), "view_2": s.images(f"second{i}")}
        terms = method.penalty(target, outputs, None)
        images_terms.append(terms["contrast_images"].detach())
        classes_terms.append(terms["contrast_classes"].detach())
        loss = sum(terms.values()) + F.cross_entropy(outputs["logits"], outputs["labels"])
        found = gradients(loss, trained)
        with torch.no_grad():
            for name, p in trained.items():
                p -= 0.01 * found[name]
    return {
        "contrast_images": torch.stack(images_terms),
        "contrast_classes": torch.stack(classes_terms),
        "gradient": found,
        "queues": {"z": method.queue_z.clone(), "g": method.queue_g.clone(), "position": method.position.double()},
        "keys": copies(method.key_encoder.backbone_parameters())
        | {f"P.{n}": p.detach().clone() for n, p in method.key_projection.named_parameters()},
        "key_statistics": {n: b.clone() for n, b in method.key_encoder.traced.named_buffers() if b.is_floating_point()},
    }


def channel_draws(model: nn.Module) -> dict[str, Tensor]:
    """Each BatchNorm layer's draw for its channels, by its name."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    return {n: draw(f"stochnorm:{n}", (m.num_features,), "uniform") for n, m in layers}


@contextmanager
def given_rand(values: list[Tensor]):
    """torch.rand returns what is drawn for the layer that asks; layers are told apart by the order of their calls."""
    rand, left = torch.rand, iter(values)
    torch.rand = lambda *size, **_: next(left)
    try:
        yield
    finally:
        torch.rand = rand


def order_of_batchnorm(model: nn.Module, images: Tensor) -> list[str]:
    order, handles = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(lambda m, i, name=name: order.append(name)))
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return order


def stochnorm(s: Setup) -> dict:
    _, target = s.networks()
    images, labels = s.images("batch"), s.labels("batch")
    draws, order = channel_draws(target.model), order_of_batchnorm(s.target_model(), images)
    method = dt.StochNorm(p=0.5)
    method.setup(target)
    with given_rand([draws[name] for name in order]):
        logits = target.train()(images)["logits"]
    loss = F.cross_entropy(logits, labels)
    result = {"logits": logits.detach(), "gradient": gradients(loss, target.traced.named_parameters())}
    result["statistics"] = {n: b.clone() for n, b in target.traced.named_buffers() if b.is_floating_point()}
    return result


LWF_T = 2.0


def lwf(s: Setup) -> dict:
    """On the scale of a mean over the batch (KLDivLoss batchmean), without T^2: ours times K / (2 alpha T^2)."""
    source, target = s.networks()
    images = s.images("batch")
    method = dt.LwF(alpha=ALPHA, temperature=LWF_T)
    method.setup(target, {}, {"logits": (s.source_classes,)})
    method.double()
    with torch.no_grad():
        for name, p in method.heads.named_parameters():
            p.copy_(draw(f"lwf:{name}", p.shape) / 3)
    outputs, source_outputs = target(images), source(images)
    (term,) = method.penalty(target, outputs, source_outputs).values()
    term = term * s.source_classes / (2 * ALPHA * LWF_T**2)
    return {
        "divergence": term,
        "gradient": gradients(term, target.backbone_parameters()),
        "source_head": gradients(term, method.heads.named_parameters()),
    }


METHODS = {
    f.__name__: f
    for f in (
        *(l2_sp, l2_sp_conv, l2_sp_fisher_add, l2_sp_fisher_min, delta_noatt, delta_given, channel_attention),
        *(probe_training, delta_steps, afa_spatial, afa_channel, l2t_matching, l2t_iterations, bss, co_tuning),
        *(bi_tuning, stochnorm, lwf),
    )
}


def reduced(value) -> list[float]:
    """A scalar: itself. A tensor: its first five values, its norm, and its product with a fixed sine. Several tensors:
    for all together norm and product; then the norms of the first, the middle and the last by name.
    """
    if isinstance(value, dict):
        names = sorted(value)
        chosen = [names[0], names[len(names) // 2], names[-1]]
        flat = torch.cat([value[n].detach().double().flatten() for n in names])
        return [*_of(flat), *(value[n].norm().item() for n in chosen), *value[names[0]].flatten()[:5].tolist()]
    value = torch.as_tensor(value).detach().double()
    if value.numel() == 1:
        return [value.item()]
    return [*value.flatten()[:5].tolist(), *_of(value.flatten())]


def _of(flat: Tensor) -> list[float]:
    sine = torch.from_numpy(np.sin(0.1 + 0.37 * np.arange(flat.numel())))
    return [flat.norm().item(), (flat @ sine).item()]


def difference(found: list[float], expected: list[float]) -> float:
    """Largest difference, relative to the largest of the numbers of its kind (a product may be near 0)."""
    if len(found) != len(expected):
        return float("inf")
    scale = max(abs(v) for v in expected) or 1.0
    return max(abs(a - b) / max(abs(b), 1e-3 * scale) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", GOLDEN["methods"])
def test_a_method_agrees_with_its_authors(name):
    setup = {key: value for key, value in GOLDEN["setup"].items() if key != "kind"}
    found, expected = METHODS[name](Setup(**setup)), GOLDEN["methods"][name]
    worst = {quantity: difference(reduced(found[quantity]), numbers) for quantity, numbers in expected.items()}
    assert max(worst.values()) <= LIMIT, worst


def test_no_method_is_left_out():
    assert METHODS.keys() == GOLDEN["methods"].keys() and len(METHODS) == 18
