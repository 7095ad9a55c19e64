"""The published protocols: their options compute what they say, and the experiment files have the published values."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from delta_transfer.common.options import OptionError
from delta_transfer.data.jitter import Jitter
from delta_transfer.data.loader import Loader, resized
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import ScheduleConfig, SGDConfig, make_optimizer
from delta_transfer.methods import L2FE, BiTuning, LwF
from delta_transfer.methods.attention import AttentionConfig, train_probe
from delta_transfer.methods.base import Batch
from delta_transfer.records.cards import steps

from .miniature import composed

# What the published code does, line by line of the list of differences: words of a command, and options that it has.
# Two lines have no option: the gradient of StochNorm (8) and the commit that LwF cites (13).
OFFICIAL, TLL, AFA, L2_SP = (f"+experiment={name}" for name in ("delta_official", "tll", "afa_dogs", "l2_sp_official"))
LINES = [
    (1, [OFFICIAL], {"reg.attention.probe_batchnorm": "train", "reg.attention.head_weight_decay": 1e-4}),
    (1, [OFFICIAL], {"reg.attention.head_epochs": 10, "reg.attention.head_lr": 0.01, "reg.attention.method": "exact"}),
    (1, [TLL, "reg=delta"], {"reg.attention.probe_batchnorm": "train", "reg.attention.head_weight_decay": 0.0}),
    (2, [OFFICIAL], {"reg.attention.batch_size": 32, "reg.attention.images": 4 * 32}),
    (2, [TLL, "reg=delta"], {"reg.attention.batch_size": 32, "reg.attention.images": 10 * 32}),
    (3, [OFFICIAL], {"schedule.iterations": 6000, "schedule.batch_size": 64, "schedule.lr": 0.01}),
    (3, [OFFICIAL], {"schedule.decay": "exponential", "schedule.decay_per_epoch": True, "schedule.decay_factor": 0.1}),
    (3, [OFFICIAL], {"schedule.decay_at": 0.67, "optimizer.momentum": 0.9, "optimizer.nesterov": False}),
    (3, [OFFICIAL], {"reg.alpha": 0.01, "reg.beta": 0.01, "reg.weight_decay": 0.0, "backbone.name": "resnet101"}),
    (
        3,
        [OFFICIAL, "dataset=dogs", "experiment/values=official_dogs_delta"],
        {"reg.alpha": 0.1, "reg.beta": 0.01, "schedule.decay": "exponential", "reg.attention.images": 128},
    ),
    (3, ["+experiment=paper_main", "reg=delta"], {"schedule.iterations": 9000, "schedule.decay": "step"}),
    (4, [OFFICIAL], {"schedule.aspect": "squash", "schedule.train_crop": "random", "schedule.test_image": "whole"}),
    (4, [AFA], {"schedule.aspect": "squash", "schedule.test_image": "crop", "schedule.test_crops": 1}),
    *((5, words, {"precision": "fp32"}) for words in ([OFFICIAL], [TLL], [AFA], [L2_SP])),
    (6, [OFFICIAL, "reg=delta_noatt"], {"reg.normalize": False, "reg.alpha": 0.01, "reg.beta": 0.01}),
    (6, [TLL, "reg=delta_noatt"], {"reg.normalize": False, "reg.alpha": 0.01, "reg.beta": 0.01}),
    (6, ["+experiment=paper_main", "reg=delta_noatt"], {"reg.normalize": True, "reg.alpha": 0.01}),
    (7, [TLL, "reg=lwf"], {"reg.head": "source", "reg.temperature": 3.0, "reg.beta": 0.0, "reg.weight_decay": 5e-4}),
    (7, [TLL, "reg=lwf"], {"reg.alpha": pytest.approx(4 * 1000 / (2 * 3**2))}),
    (9, [L2_SP], {"schedule.brightness": pytest.approx(63 / 255 / 255, rel=1e-4), "schedule.saturation": 0.5}),
    (9, [L2_SP], {"schedule.contrast": 0.8, "schedule.decay_at": pytest.approx(5000 / 9000, rel=1e-4)}),
    (9, [L2_SP], {"reg.alpha": 0.1, "reg.beta": 0.01, "reg.scope": "conv", "reg.weight_decay": 0.0}),
    (9, [L2_SP], {"schedule.iterations": 9000, "schedule.batch_size": 64, "schedule.lr": 0.01, "dataset.name": "dogs"}),
    (9, [L2_SP], {"schedule.aspect": "squash", "schedule.test_image": "crop", "backbone.name": "resnet101"}),
    (10, ["+experiment=paper_main", "backbone=inception_v3", "reg=delta"], {"schedule.lr": 0.01}),
    (
        10,
        ["+experiment=paper_main", "backbone=inception_v3", "schedule=paper_inception", "reg=delta"],
        {"schedule.lr": 0.001},
    ),
    (11, [TLL, "reg=bi_tuning"], {"reg.head_std": 0.01, "reg.queue": 40, "reg.temperature": 0.07}),
    (11, [TLL, "reg=bi_tuning"], {"reg.momentum": 0.999, "reg.dimensions": 128, "reg.weight_decay": 5e-4}),
    (12, [AFA, "backbone=mobilenet_v2", "reg=l2_fe"], {"reg.fixed_statistics": False, "schedule.epochs": 10}),
    (12, [AFA, "backbone=mobilenet_v2", "reg=l2_fe"], {"schedule.decay": "exponential", "schedule.decay_at": 6 / 10}),
]
# What no line names, but the files of these protocols have to have.
REST = [
    ([TLL, "reg=l2"], {"schedule.iterations": 20 * 500, "schedule.batch_size": 48, "schedule.lr": 0.01}),
    ([TLL, "reg=l2"], {"schedule.decay": "step", "schedule.decay_at": 12 / 20, "schedule.decay_factor": 0.1}),
    ([TLL, "reg=l2"], {"schedule.backbone_lr_factor": 0.1, "optimizer.nesterov": True, "optimizer.momentum": 0.9}),
    ([TLL, "reg=l2"], {"schedule.train_crop": "random_resized", "schedule.min_crop_area": 0.2, "schedule.pad": 0}),
    ([TLL, "reg=l2"], {"schedule.aspect": "keep", "schedule.test_image": "crop", "backbone.name": "resnet50"}),
    ([TLL, "reg=l2"], {"reg.weight_decay": 5e-4}),
    ([TLL, "reg=delta"], {"reg.alpha": 0.01, "reg.beta": 0.01, "reg.weight_decay": 0.0}),
    ([TLL, "reg=bss"], {"reg.alpha": 1e-3, "reg.k": 1, "reg.weight_decay": 5e-4}),
    ([TLL, "reg=stochnorm"], {"reg.p": 0.5, "reg.weight_decay": 5e-4}),
    ([TLL, "reg=co_tuning"], {"reg.alpha": 2.3, "reg.weight_decay": 5e-4}),
    ([AFA], {"dataset.name": "dogs", "backbone.name": "resnet101", "schedule.iterations": 4500, "schedule.lr": 0.01}),
    ([AFA], {"reg.alpha": 0.1, "reg.channel_alpha": 0.15, "reg.channel_lr_factor": 0.1, "reg.beta": 0.01}),
    ([AFA], {"schedule.batch_size": 64, "schedule.decay": "step", "schedule.decay_at": pytest.approx(16 / 24, 1e-4)}),
    ([AFA, "backbone=mobilenet_v2"], {"reg.alpha": 0.09, "reg.channel_alpha": 0.04, "reg.channel_lr_factor": 0.1}),
]


def value(config, key: str):
    for name in key.split("."):
        config = getattr(config, name)
    return config


composed_once = cache(composed)


@pytest.mark.parametrize(("line", "words", "expected"), [*LINES, *((0, *entry) for entry in REST)])
def test_the_experiment_files_have_the_published_values(line, words, expected):
    config = composed_once(*words)
    assert {key: value(config, key) for key in expected} == expected


def test_no_line_of_the_list_is_left_out():
    assert {line for line, *_ in LINES} | {8, 13} == set(range(1, 14))
    assert "alinlab/L2T-ww at 6883556" in LwF.__doc__


def test_what_cites_code_names_the_commit():
    """Of each public repository, once in each file that takes something from it."""
    repositories = [
        *{name for file in CITING for name in re.findall(r"\b([\w-]+/[\w-]+) at [0-9a-f]{7}\b", text_of(file))}
    ]
    assert len(repositories) >= 10
    for file in CITING:
        for name in repositories:
            if re.search(rf"\b{name}\b", text_of(file)):
                assert re.search(rf"\b{name}\s+at\s+[0-9a-f]{{7}}\b", text_of(file)), (file.name, name)


ROOT = Path(__file__).parent.parent
CITING = [
    *(ROOT / "src/delta_transfer/methods").glob("*.py"),
    *(ROOT / "src/delta_transfer/engine/averages").glob("*.py"),
]
CITING += [*(ROOT / "conf/experiment").rglob("*.yaml")]


@cache
def text_of(file: Path) -> str:
    return re.sub(r"\n[# ]*", " ", file.read_text(encoding="utf-8"))


# ---- the probe -----------------------------------------------------------------------------------------------


def probes(source, mode: str):
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    options = AttentionConfig(head_epochs=3, probe_batchnorm=mode)
    return train_probe(source, [(images[:4], labels[:4]), (images[4:], labels[4:])], 3, options), images


def test_the_probes_statistics_stay_or_move_to_the_new_images(tiny_source):
    before = {name: value.clone() for name, value in tiny_source.weights().items()}
    still, _ = probes(tiny_source, "eval")
    moved, images = probes(tiny_source, "train")
    assert torch.equal(still.weights()["bn1.running_mean"], before["bn1.running_mean"])
    expected = before["bn1.running_mean"].clone()
    for _ in range(3):
        for batch in images.split(4):
            mean = tiny_source.model.conv1(batch).mean(dim=(0, 2, 3))
            expected += 0.1 * (mean - expected)
    assert torch.allclose(moved.weights()["bn1.running_mean"], expected, atol=1e-5)
    assert not moved.training and not any(p.requires_grad for p in moved.parameters())
    assert torch.equal(moved.weights()["conv1.weight"], before["conv1.weight"])
    assert all(torch.equal(value, before[name]) for name, value in tiny_source.weights().items())


def test_the_default_probe_has_the_name_that_it_had():
    official = composed("reg=delta", "experiment/values=official_delta").reg.build()
    default = composed("reg=delta").reg.build()
    assert "probe_batchnorm" not in default.fit_options() and default.fit_batch_size is None
    assert official.fit_options()["probe_batchnorm"] == "train" and official.fit_batch_size == 32


# ---- feature extraction --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [True, False])
def test_the_statistics_of_l2_fe_stay_or_follow_the_batches(fixed, tiny_source):
    method, target = L2FE(fixed_statistics=fixed), tiny_source.with_new_head(3, seed=0).requires_grad_(True)
    method.setup(target)
    optimizer = make_optimizer(target, method, SGDConfig(), ScheduleConfig(iterations=1))
    state = TrainState(target, None, optimizer, "fp32")
    before = {name: value.clone() for name, value in target.weights().items()}
    images, expected = torch.randn(4, 3, 8, 8), before["bn1.running_mean"].clone()
    with torch.no_grad():
        mean = tiny_source.model.conv1(images).mean(dim=(0, 2, 3))
    reference = tiny_source.with_new_head(3, seed=0).train(not fixed)
    for step in range(2):
        logits, _, _ = train_step(state, method, Batch(images, torch.tensor([0, 1, 2, 0])))
        expected += 0.1 * (mean - expected)
        if step == 0:
            assert torch.allclose(logits, reference(images)["logits"], atol=1e-4)
    after = target.weights()
    assert target.training != fixed
    assert torch.allclose(after["bn1.running_mean"], before["bn1.running_mean"] if fixed else expected, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in target.backbone_parameters().items())
    assert not any(torch.equal(p, before[name]) for name, p in target.head_parameters().items())


# ---- images --------------------------------------------------------------------------------------------------


class Stored:
    def __init__(self, pixels: np.ndarray):
        count, side = pixels.shape[:2]
        self.pixels, self.sizes = pixels.reshape(-1, 3), np.full((count, 2), side)
        self.starts = np.arange(count) * side * side


def loader_of(pixels: np.ndarray, **options) -> Loader:
    return Loader(
        Stored(pixels),
        np.zeros(len(pixels), dtype=np.int64),
        crop=8,
        mirror=False,
        mean=[0.4, 0.5, 0.6],
        std=[0.2, 0.3, 0.25],
        batch_size=4,
        seed=0,
        device=torch.device("cpu"),
        **options,
    )


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3)).astype(np.uint8)


def test_the_whole_test_image_is_resized(pixels):
    batch, _ = next(iter(loader_of(pixels, whole=True).test_batches(np.arange(2))))
    for image, stored in zip(batch, pixels, strict=False):
        small = resized(torch.from_numpy(stored), 8).permute(2, 0, 1).float() / 255
        expected = (small - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
        assert torch.allclose(image, expected, atol=1e-5)
    with pytest.raises(OptionError):
        ScheduleConfig(iterations=1, test_image="whole", test_crops=10)


def test_colours_change_as_tensorflow_changes_them():
    """Brightness, then saturation in HSV, then contrast, for one image with the drawn factors, pixel by pixel."""
    import colorsys

    image = torch.rand(3, 4, 5, dtype=torch.float64)
    random = torch.tensor([[0.75, 0.9, 0.1]], dtype=torch.float64)
    found = Jitter(brightness=0.1, contrast=0.8, saturation=0.5).apply(image[None], random)[0]
    expected = image + 0.1 * 0.5
    for row in range(4):
        for column in range(5):
            h, s, v = colorsys.rgb_to_hsv(*expected[:, row, column].tolist())
            changed = colorsys.hsv_to_rgb(h, min(s * (1 + 0.5 * 0.8), 1.0), v)
            expected[:, row, column] = torch.tensor(changed, dtype=torch.float64)
    mean = expected.mean(dim=(1, 2), keepdim=True)
    assert torch.allclose(found, mean + (expected - mean) * (1 - 0.8 * 0.8), atol=1e-9)


def test_colours_of_training_images_follow_from_seed_and_iteration_and_tests_keep_theirs(pixels):
    plain, changed = loader_of(pixels), loader_of(pixels, jitter=Jitter(contrast=0.8))
    first, again, other = (changed.train_batch(np.arange(6), iteration)[0] for iteration in (0, 0, 3))
    assert torch.equal(first, again) and not torch.equal(first, plain.train_batch(np.arange(6), 0)[0])
    same = loader_of(pixels, jitter=Jitter()).train_batch(np.arange(6), 3)[0]
    assert torch.allclose(same, plain.train_batch(np.arange(6), 3)[0], atol=1e-5)
    tests = [next(iter(loader.test_batches(np.arange(4))))[0] for loader in (plain, changed)]
    assert torch.equal(*tests) and other.shape == first.shape


def test_batches_of_a_fit_may_have_a_size_of_their_own(pixels):
    loader = loader_of(pixels)
    sizes = [[len(labels) for _, labels in loader.passes(np.arange(6), "fit", 0, size)] for size in (None, 3)]
    assert sizes == [[4, 4], [3, 3]]


def test_a_card_says_that_the_whole_image_is_taken():
    pixels = {"resize": 256, "center_crop": 224, "scale": None, "aspect": "squash", "interpolation": "bilinear"}
    pixels |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    card = {"preprocessing": pixels, "measured": {"crops": 1, "mirrored": True}}
    whole = card | {"preprocessing": pixels | {"test_image": "whole"}}
    assert steps(card) != steps(whole) and any("224 x 224" in step for step in steps(whole))


# ---- heads ---------------------------------------------------------------------------------------------------


def test_bi_tunings_head_begins_as_in_its_library_if_asked_to(tiny_source):
    target = tiny_source.with_new_head(50, seed=0)
    BiTuning(head_std=0.01).setup(target)
    weight, bias = target.head_parameters()["fc.weight"], target.head_parameters()["fc.bias"]
    assert weight.std().item() == pytest.approx(0.01, rel=0.2) and not bias.any()
    other = tiny_source.with_new_head(50, seed=0)
    BiTuning().setup(other)
    assert torch.equal(
        other.head_parameters()["fc.weight"], tiny_source.with_new_head(50, 0).head_parameters()["fc.weight"]
    )


def test_lwf_with_the_sources_own_head_is_the_librarys_loss(tiny_source):
    """lam * mean over the batch of KL(softmax(z / T) || softmax(s / T)), s from the frozen head on the target."""
    lam, temperature, classes = 4.0, 3.0, 4
    method = LwF(alpha=lam * classes / (2 * temperature**2), temperature=temperature, head="source")
    method.fit(tiny_source, [], 3)
    target = tiny_source.with_new_head(3, seed=0).requires_grad_(True).train()
    method.setup(target, {}, {"logits": (classes,)})
    assert [p.requires_grad for p in method.parameters()] == [False, False]
    images = torch.randn(5, 3, 8, 8)
    found, z = target(images), tiny_source(images)["logits"]
    s = nn.functional.linear(found["embedding"], tiny_source.weights()["fc.weight"], tiny_source.weights()["fc.bias"])
    expected = 0.0
    for row_z, row_s in zip(z / temperature, s / temperature, strict=True):
        p, q = row_z.softmax(dim=0), row_s.softmax(dim=0)
        expected += lam * sum((p[k] * (p[k].log() - q[k].log())).item() for k in range(classes)) / len(images)
    assert method.penalty(target, found, {"logits": z})["distillation"].item() == pytest.approx(expected, rel=1e-4)
    assert not method.needs.other_sources and LwF().needs.other_sources
    with pytest.raises(RuntimeError):
        LwF(head="source").setup(target, {}, {"logits": (classes,)})
