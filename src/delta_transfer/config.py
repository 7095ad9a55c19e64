"""The typed schema of everything in conf/, and the only place that validates it.

Hydra merges YAML and command line into these dataclasses, so a misspelt key or a wrong type fails at composition;
`__post_init__` checks values. Nothing here imports torch: a mistake is reported before anything slow happens.
"""

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .common.errors import UserError
from .common.options import (
    LARGEST_BATCH,
    LARGEST_SIDE,
    LONGEST,
    require,
    require_at_most,
    require_not_negative,
    require_one_of,
    require_positive,
    require_seed,
)

# --- dataset ---------------------------------------------------------------------------------------------------------


@dataclass
class OfficialCounts:
    """What the publisher says the whole data set holds; delta-data compares with it."""

    classes: int = MISSING
    train: int = MISSING
    test: int = MISSING


@dataclass
class DatasetConfig:
    name: str = MISSING  # key of delta_transfer.data.DATASETS
    root: str | None = None  # where the publisher's files are
    download: bool = False  # fetch them first, where torchvision knows how
    official: OfficialCounts | None = None
    images_per_class: int | None = None  # stratified draw from the training part; null = all
    sample_rate: float = 1.0  # the same as a fraction of each class, rounded up
    subset_seed: int = 0  # seed of every draw of images; independent of `seed`: the data set stays the same over seeds
    mirror: bool = True  # whether training images are mirrored at random

    def __post_init__(self):
        require_positive(self, "dataset", "images_per_class")
        require_seed("dataset.subset_seed", self.subset_seed)
        require(0 < self.sample_rate <= 1, f"dataset.sample_rate must be in (0, 1], got {self.sample_rate}.")
        require(
            self.images_per_class is None or self.sample_rate == 1,
            "dataset.images_per_class and dataset.sample_rate both limit the training part: set one of them.",
        )


def require_embedded(dataset: DatasetConfig) -> None:
    require(
        dataset.root is None,
        f"dataset.root={dataset.root}: {dataset.name} is embedded and has no folder. For images of your own: "
        f"dataset=folder dataset.root={dataset.root}",
    )


@dataclass
class DrawnConfig(DatasetConfig):
    """A data set without an official split: so many images of each class, drawn with `subset_seed`."""

    train_per_class: int = MISSING
    test_per_class: int | None = None  # null = all that are left
    clutter: bool = False  # whether the background class counts (Caltech)
    numbering: str = "random"  # random | fixed: image numbers 1..N train, 61..80 test (L2-SP's code, Caltech-256)

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "dataset", "train_per_class", "test_per_class")
        require(
            self.numbering in ("random", "fixed"), f"dataset.numbering must be random or fixed, got {self.numbering!r}."
        )


@dataclass
class DTDConfig(DatasetConfig):
    partition: int = 1  # which of the ten official splits

    def __post_init__(self):
        super().__post_init__()
        require(1 <= self.partition <= 10, f"dataset.partition must be in 1..10, got {self.partition}.")


@dataclass
class FolderConfig(DatasetConfig):
    test_fraction: float = 0.2  # of each class, drawn with `subset_seed`; only where there is no test folder

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.test_fraction < 1, f"dataset.test_fraction must be in (0, 1), got {self.test_fraction}.")


@dataclass
class GlyphsConfig(DatasetConfig):
    scripts: list[str] = MISSING  # which alphabets
    train_per_class: int = MISSING
    test_per_class: int = MISSING
    render_size: int = MISSING  # pixels of the rendered image before `backbone.resize`
    render_seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        require_embedded(self)
        require_at_most(LARGEST_BATCH, self, "dataset", "train_per_class", "test_per_class")
        require_at_most(LARGEST_SIDE, self, "dataset", "render_size")
        require_seed("dataset.render_seed", self.render_seed)


@dataclass
class PairsConfig(DatasetConfig):
    """A data set for task=verification: classes to train on, and pairs of images of other classes to test on."""


@dataclass
class LFWConfig(PairsConfig):
    train_root: str | None = None  # <person>/<image> to train on; null = the persons of LFW that are in no pair
    min_images: int = 2  # a person with fewer is not trained on

    def __post_init__(self):
        super().__post_init__()
        require_at_most(LONGEST, self, "dataset", "min_images")


@dataclass
class GlyphPairsConfig(PairsConfig):
    scripts: list[str] = MISSING  # alphabets to train on
    test_scripts: list[str] = MISSING  # alphabets of the pairs
    train_per_class: int = MISSING
    test_per_class: int = MISSING
    pair_folds: int = 10
    pairs_per_fold: int = MISSING  # of one letter, and as many of two
    render_size: int = MISSING  # pixels of the rendered image before `backbone.resize`
    render_seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        require_embedded(self)
        require_at_most(LARGEST_BATCH, self, "dataset", "train_per_class", "test_per_class", "pairs_per_fold")
        require(2 <= self.pair_folds <= LONGEST, f"dataset.pair_folds must be at least 2, got {self.pair_folds}.")
        require_at_most(LARGEST_SIDE, self, "dataset", "render_size")
        require_seed("dataset.render_seed", self.render_seed)


# --- backbone --------------------------------------------------------------------------------------------------------


@dataclass
class BackboneConfig:
    name: str = MISSING  # torchvision's model name, or a network of ours (models/zoo.py)
    weights: str = MISSING  # torchvision weight enum | state-dict file | none | glyphs (see delta-pretrain)
    image_size: int = MISSING  # crop that the network sees, pixels
    resize: int = MISSING  # size of the stored image that is cropped, pixels
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    head: str = MISSING  # the classification layer, a torch.nn.Linear
    taps: list[str] = MISSING  # modules whose outputs are the tapped feature maps
    aux_head: str | None = None  # Inception's auxiliary classification layer
    aux_weight: float = 0.0  # weight of its cross-entropy; 0 = not computed at all

    def __post_init__(self):
        require_at_most(LARGEST_SIDE, self, "backbone", "image_size", "resize")
        require_not_negative(self, "backbone", "aux_weight")
        require(
            self.resize >= self.image_size,
            f"backbone.resize ({self.resize}) must be at least backbone.image_size ({self.image_size}).",
        )
        require(len(self.mean) == len(self.std) == 3, "backbone.mean and backbone.std need three values each.")
        require(all(map(math.isfinite, self.mean)), f"backbone.mean must be finite, got {self.mean}.")
        require(all(0 < s < math.inf for s in self.std), f"backbone.std must be positive, got {self.std}.")
        require(len(set(self.taps)) == len(self.taps), f"backbone.taps names a layer twice: {self.taps}.")
        require(
            self.aux_weight == 0 or self.aux_head is not None,
            f"backbone.aux_weight is {self.aux_weight}, but this backbone has no auxiliary head.",
        )


# --- reg -------------------------------------------------------------------------------------------------------------


@dataclass
class RegConfig:
    """Enough for a method with a strength alpha; a method with options of its own extends it below."""

    name: str = MISSING  # key of delta_transfer.methods.REGULARIZERS
    alpha: float = 0.0  # strength of the penalty on the backbone
    beta: float = 0.0  # strength of the L2 penalty on the new head
    weight_decay: float = 0.0  # of the optimizer, on every trained parameter

    def __post_init__(self):
        require_not_negative(self, "reg", "alpha", "beta", "weight_decay")


@dataclass
class DecayConfig:
    """Methods without a penalty (L2, L2-FE, scratch): only weight decay."""

    name: str = MISSING
    weight_decay: float = 1e-4

    def __post_init__(self):
        require_not_negative(self, "reg", "weight_decay")


@dataclass
class L2SPConfig(RegConfig):
    scope: str = "all"  # all | conv

    def __post_init__(self):
        super().__post_init__()
        require(self.scope in ("all", "conv"), f"reg.scope must be all or conv, got {self.scope!r}.")


@dataclass
class DeltaWithoutAttentionConfig(RegConfig):
    normalize: bool = True  # divide by H*W as DELTA does; false = the authors' undivided sum


@dataclass
class AFAConfig(RegConfig):
    """`alpha` is that of the spatial stage."""

    channel_alpha: float = 0.15
    channel_lr_factor: float = 0.1  # learning rate of the channel stage as a multiple of schedule.lr
    aligned_to: str = "previous"  # of the channel stage: previous (the spatial stage's network) | source

    def __post_init__(self):
        super().__post_init__()
        require_not_negative(self, "reg", "channel_alpha")
        require_positive(self, "reg", "channel_lr_factor")
        require(
            self.aligned_to in ("previous", "source"),
            f"reg.aligned_to must be previous or source, got {self.aligned_to!r}.",
        )


@dataclass
class AttentionConfig:
    method: str = "exact"  # exact | taylor: first-order estimate, one backward pass
    images: int = 256  # training images on which removing a channel is tried
    head_epochs: int = 10  # training of the probe's head
    head_lr: float = 0.01
    head_weight_decay: float = 1e-4
    temperature: float = 5.0  # of the softmax over a layer's standardised importances
    # Images per forward pass while probing: bounds memory, changes no result. null: as many as suit the device.
    forward_images: int | None = None
    seed: int = 0  # order and crops of the probe's images; independent of `seed`: once per data set

    def __post_init__(self):
        require_positive(self, "reg.attention", "head_lr", "temperature", "forward_images")
        require_at_most(LONGEST, self, "reg.attention", "images", "head_epochs")
        require_not_negative(self, "reg.attention", "head_weight_decay")
        require_seed("reg.attention.seed", self.seed)
        require(
            self.method in ("exact", "taylor"), f"reg.attention.method must be exact or taylor, got {self.method!r}."
        )


@dataclass
class DeltaConfig(RegConfig):
    attention: AttentionConfig = field(default_factory=AttentionConfig)


@dataclass
class LwFConfig(RegConfig):
    temperature: float = 2.0  # of the softmax over both networks' logits

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "reg", "temperature")


@dataclass
class FisherConfig:
    images: int = 256  # training images on which the Fisher information is estimated
    seed: int = 0  # order, crops and labels of these; independent of `seed`: once per data set

    def __post_init__(self):
        require_at_most(LONGEST, self, "reg.fisher", "images")
        require_seed("reg.fisher.seed", self.seed)


@dataclass
class L2SPFisherConfig(RegConfig):
    form: str = "add"  # weight of an entry: add, F + eps | min, min(F, eps)
    eps: float = 0.0
    fisher: FisherConfig = field(default_factory=FisherConfig)

    def __post_init__(self):
        super().__post_init__()
        require_one_of(self, "form", "add", "min")
        require_not_negative(self, "reg", "eps")
        require(self.form == "add" or self.eps > 0, "reg.form=min with reg.eps=0 is no penalty: set reg.eps.")


@dataclass
class ProbeConfig:
    """Logistic regression on the source's features, for a first head."""

    c: float | None = None  # of c * (sum of cross-entropy) + 1/2 ||W||^2; null: chosen on held-out training images
    choices: int = 50  # of c, from 1e-7 to 1e2
    iterations: int = 200  # at most, of L-BFGS for each
    seed: int = 0  # of the images that are held out

    def __post_init__(self):
        require_positive(self, "reg.probe", "c")
        require_at_most(LONGEST, self, "reg.probe", "choices", "iterations")
        require_seed("reg.probe.seed", self.seed)


@dataclass
class LPFTConfig(DecayConfig):
    weight_decay: float = 0.0
    fixed_statistics: bool = True  # BatchNorm in training normalises as in evaluation
    probe: ProbeConfig = field(default_factory=ProbeConfig)


@dataclass
class RIFLEConfig(DecayConfig):
    at: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])  # fractions of the schedule
    bound: str = "features"  # the new weights are uniform up to 1/sqrt(this): features | classes
    bias: bool = False  # whether the bias is drawn anew, too
    reset_momentum: bool = False  # whether the optimizer forgets what it has gathered for the head

    def __post_init__(self):
        super().__post_init__()
        require_one_of(self, "bound", "classes", "features")
        require(
            bool(self.at) and all(0 < at < 1 for at in self.at),
            f"reg.at must be fractions of the schedule in (0, 1), got {self.at}.",
        )


@dataclass
class StochNormConfig(DecayConfig):
    weight_decay: float = 5e-4
    p: float = 0.5  # of a channel being normalised by the batch

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.p <= 1, f"reg.p must be in [0, 1], got {self.p}.")


@dataclass
class BiTuningConfig(RegConfig):
    queue: int = 40  # past keys of each class
    temperature: float = 0.07
    momentum: float = 0.999  # of the key encoder
    dimensions: int = 128  # of the projection

    def __post_init__(self):
        super().__post_init__()
        require_at_most(LARGEST_BATCH, self, "reg", "queue", "dimensions")
        require_positive(self, "reg", "temperature")
        require(0 <= self.momentum < 1, f"reg.momentum must be in [0, 1), got {self.momentum}.")


@dataclass
class BSSConfig(RegConfig):
    k: int = 1  # of the smallest singular values

    def __post_init__(self):
        super().__post_init__()
        require_at_most(LARGEST_BATCH, self, "reg", "k")


@dataclass
class PairsRegConfig(RegConfig):
    """A method that compares feature maps of source and target, pair by pair."""

    pairs: str = "one_to_one"  # all_to_all | one_to_one | single

    def __post_init__(self):
        super().__post_init__()
        require_one_of(self, "pairs", "all_to_all", "one_to_one", "single")


@dataclass
class L2TConfig(PairsRegConfig):
    pairs: str = "all_to_all"
    what: bool = True  # channel weights are learned; false: a sum over channels
    where: str = "relu6"  # amount of each pair: relu6 | relu | relu_mean | constant | off
    inner_steps: int = 2  # on the matching loss, tried and forgotten in every step
    meta_lr: float = 1e-4  # of the meta-networks, by Adam; 0: they stay as they begin
    meta_weight_decay: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        require_one_of(self, "where", "relu6", "relu", "relu_mean", "constant", "off")
        require_positive(self, "reg", "inner_steps")
        require_not_negative(self, "reg", "meta_lr", "meta_weight_decay")


@dataclass
class SumConfig:
    """The penalties of several methods, added: +reg@reg.terms.<any name>=<method> adds one more."""

    name: str = MISSING  # any; sum stands for the names of its terms
    terms: dict[str, Any] = field(default_factory=dict)  # of reg, each by its own schema
    beta: float = 0.0  # strength of the L2 penalty on the new head: that of the terms is 0 here
    weight_decay: float = 1e-4  # likewise

    def __post_init__(self):
        require_not_negative(self, "reg", "beta", "weight_decay")
        require(bool(self.terms), "A sum needs terms: reg=sum +reg@reg.terms.at=at has one, reg=at by the name of at.")
        for name, term in self.terms.items():
            require(
                hasattr(term, "name"),
                f"reg.terms.{name} is not a method: +reg@reg.terms.{name}=METHOD adds one of conf/reg.",
            )
            for key in ("beta", "weight_decay"):
                if hasattr(term, key):
                    setattr(term, key, 0.0)
        if self.name == "sum":
            self.name = "_".join(term.name for term in self.terms.values())
        require(
            bool(re.fullmatch(r"[\w.+-]{1,80}", self.name)),
            f"reg.name={self.name!r} becomes a part of a folder's name: up to 80 letters, digits and _ . + -.",
        )


@contextmanager
def about_term(name: str) -> Iterator[None]:
    """A term's checks speak of reg.alpha, which in a sum is reg.terms.<name>.alpha."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"\breg\.", f"reg.terms.{name}.", str(error))) from None


# --- schedule, split, run --------------------------------------------------------------------------------------------


def automatic(images: int, batch_size: int) -> tuple[int, int]:
    """Iterations and batch size of schedule.iterations=auto on so many training images.

    `batch_size` is halved until a batch takes half of the images at most, but not below 2, which BatchNorm needs. Then
    about 30 passes over the images: at least 300 iterations, with fewer of which a new head is not trained, and at most
    the paper's 9,000.
    """
    while batch_size > max(2, images // 2):
        batch_size //= 2
    return min(max(round(30 * images / batch_size), 300), 9000), batch_size


@dataclass
class ScheduleConfig:
    """A protocol: how long, with which optimizer, on which views of the images."""

    # A whole number, or auto: from the number of training images, which batches then fit, too (`automatic`).
    iterations: Any = None  # OmegaConf cannot merge int | str
    epochs: float | None = None  # passes over the training images; where set, it replaces `iterations`
    batch_size: int = 64
    accumulate: int = 1  # parts that a batch goes through in, one after the other: less memory, the same gradient
    lr: float = 0.01
    backbone_lr_factor: float = 1.0  # learning rate of the backbone as a multiple of the head's
    momentum: float = 0.9
    nesterov: bool = False
    decay: str = "step"  # of the learning rate: step | cosine, to 0 at the end, whatever the next three say
    decay_at: float = 2 / 3  # fraction of the run after which the learning rate drops
    decay_also_at: list[float] = field(default_factory=list)  # later fractions after which it drops once more
    decay_factor: float = 0.1
    aspect: str = "squash"  # squash: to backbone.resize x backbone.resize | keep: the shorter side to backbone.resize
    train_crop: str = "random"  # random: backbone.image_size pixels | random_resized: a random box, resized to that
    min_crop_area: float = 0.2  # of random_resized: smallest part of the image's area
    pad: int = 0  # pixels of black around training images, into which random crops may reach
    test_crops: int = 1  # 1: the centre | 10: corners and centre, also mirrored; the mean of their logits counts
    log_every: int = 10  # iterations; the only steps that wait for the device
    eval_every: int = 0  # iterations between evaluations on the test (or validation) part; 0 = at the end only
    checkpoint_seconds: float = 60.0  # between two checkpoints; more where one takes over 1 % of that

    def __post_init__(self):
        require(
            self.iterations is not None or self.epochs is not None,
            "schedule needs a length: set schedule.iterations or schedule.epochs.",
        )
        if self.epochs is not None:
            self.iterations = None
        require(
            self.iterations in (None, "auto") or type(self.iterations) is int,
            f"schedule.iterations must be a whole number or auto, got {self.iterations!r}.",
        )
        for name, values in (
            ("decay", ("step", "cosine")),
            ("aspect", ("squash", "keep")),
            ("train_crop", ("random", "random_resized")),
            ("test_crops", (1, 10)),
        ):
            value = getattr(self, name)
            require(value in values, f"schedule.{name} must be {values[0]} or {values[1]}, got {value!r}.")
        require(not self.nesterov or self.momentum > 0, "schedule.nesterov needs a schedule.momentum that is not 0.")
        require(0 < self.min_crop_area <= 1, f"schedule.min_crop_area must be in (0, 1], got {self.min_crop_area}.")
        require_positive(
            self,
            "schedule",
            "accumulate",
            "lr",
            "backbone_lr_factor",
            "decay_factor",
            "log_every",
            "checkpoint_seconds",
        )
        require_at_most(LONGEST, self, "schedule", "epochs")
        if self.iterations != "auto":
            require_at_most(LONGEST, self, "schedule", "iterations")
        require_at_most(LARGEST_BATCH, self, "schedule", "batch_size")
        require(
            self.batch_size % self.accumulate == 0,
            f"schedule.batch_size={self.batch_size} cannot be divided by schedule.accumulate={self.accumulate}.",
        )
        require_not_negative(self, "schedule", "momentum", "eval_every")
        require(0 < self.decay_at <= 1, f"schedule.decay_at must be in (0, 1], got {self.decay_at}.")
        require(
            all(self.decay_at <= at <= 1 for at in self.decay_also_at),
            f"schedule.decay_also_at must be in [schedule.decay_at, 1], got {self.decay_also_at}.",
        )
        require_not_negative(self, "schedule", "pad")
        require(self.pad <= LARGEST_SIDE, f"schedule.pad must be at most {LARGEST_SIDE:,}, got {self.pad}.")
        require(
            self.pad == 0 or self.train_crop == "random",
            f"schedule.pad={self.pad} is of schedule.train_crop=random, not of {self.train_crop}.",
        )

    def fitted_to(self, images: int) -> "ScheduleConfig":
        """With numbers for what is `auto`. `images`: of the training part, with those that are held out of it.

        So runs on folds are as long as the final ones, and have batches of their size, which alpha belongs to.
        """
        if self.iterations != "auto":
            return self
        iterations, batch_size = automatic(images, self.batch_size)
        return replace(self, iterations=iterations, batch_size=batch_size)

    def length(self, n_train: int) -> int:
        """Number of iterations of a run on `n_train` images; not of one that is still `auto`."""
        if self.epochs is None:
            return self.iterations
        return max(1, round(self.epochs * n_train / self.batch_size))


@dataclass
class SplitConfig:
    """A validation part, cut from the (drawn) training images class by class. The test part is never touched.

    Runs on folds exist to choose settings: they do not look at the test part at all.
    """

    val_fraction: float = 0.0
    folds: int | None = None  # k-fold cross-validation instead of a fraction
    fold: int = 0  # which fold is held out, 0 .. folds-1
    seed: int = 0

    def __post_init__(self):
        require_seed("split.seed", self.seed)
        require(0 <= self.val_fraction < 1, f"split.val_fraction must be in [0, 1), got {self.val_fraction}.")
        if self.folds is None:
            require(self.fold == 0, f"split.fold={self.fold} needs split.folds, the number of folds.")
        else:
            require(2 <= self.folds <= LONGEST, f"split.folds must be in 2..{LONGEST:,}, got {self.folds}.")
            require(self.val_fraction == 0, "split.folds and split.val_fraction both cut a validation part: set one.")
            require(0 <= self.fold < self.folds, f"split.fold must be in 0..{self.folds - 1}, got {self.fold}.")

    @property
    def measures_test(self) -> bool:
        return self.folds is None


@dataclass
class ArcFaceConfig:
    """Of task=verification; the published values."""

    scale: float = 64.0
    margin: float = 0.5  # radians

    def __post_init__(self):
        require_positive(self, "arcface", "scale")
        require(0 <= self.margin < math.pi, f"arcface.margin must be in [0, pi), got {self.margin}.")


@dataclass
class RunConfig:
    dataset: DatasetConfig = MISSING
    backbone: BackboneConfig = MISSING
    reg: Any = MISSING  # RegConfig or DecayConfig, chosen by the YAML's schema line
    schedule: ScheduleConfig = MISSING
    split: SplitConfig = field(default_factory=SplitConfig)
    task: str = "classification"  # classification | verification: the data set brings it
    arcface: ArcFaceConfig = field(default_factory=ArcFaceConfig)
    # Source networks (sources.py), a list once checked; null: the one that the target starts from, backbone.weights.
    source: Any = None
    model_card: bool = False  # describe the trained network in its file and beside it; delta-pretrain does
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto | fp32 | bf16
    compile: bool = False
    deterministic: bool = False
    data_dir: str = "data"  # where the data sets of conf/dataset look for their folders
    results_dir: str = "results"
    cache_dir: str = "results/cache"
    logging: str = "none"  # none | tensorboard: beside metrics.jsonl
    dry_run: bool = False
    retry_failed: bool = False  # make runs again that failed before, which otherwise are only reported

    def __post_init__(self):
        require(self.device in ("auto", "cpu", "cuda"), f"device must be auto, cpu or cuda, got {self.device!r}.")
        require(
            self.precision in ("auto", "fp32", "bf16"), f"precision must be auto, fp32 or bf16, got {self.precision!r}."
        )
        require(self.logging in ("none", "tensorboard"), f"logging must be none or tensorboard, got {self.logging!r}.")
        require_seed("seed", self.seed)
        self.source = checked_sources(self.source)
        pad, side = self.schedule.pad, self.backbone.image_size
        require(pad < side, f"schedule.pad ({pad}) must be less than backbone.image_size ({side}).")
        pairs = isinstance(self.dataset, PairsConfig)
        require(
            self.task == ("verification" if pairs else "classification"),
            f"task={self.task}: this data set is "
            + ("tested on pairs of images (task=verification)." if pairs else "for task=classification.")
            + ("" if pairs else " There are pairs to verify in dataset=lfw and dataset=glyph_pairs."),
        )
        require(
            getattr(self.reg, "name", None) != "scratch" or self.backbone.weights == "none",
            f"reg=scratch begins with random weights, not with {self.backbone.weights}: set backbone.weights=none.",
        )


def checked_sources(source: object) -> list[str | dict] | None:
    """`source` as a list of names or mappings {use: name, taps: [...]}."""
    if source is None:
        return None
    entries = source if isinstance(source, list) else [source]
    require(bool(entries), "source=[] names no network: null is for the one that backbone.weights names.")
    for entry in entries:
        mapping = entry if isinstance(entry, dict) else {"use": entry}
        taps = mapping.get("taps", [])
        require(
            mapping.keys() <= {"use", "taps"}
            and isinstance(mapping.get("use"), str)
            and bool(mapping["use"])
            and isinstance(taps, list)
            and all(isinstance(tap, str) for tap in taps),
            "source is a .safetensors file of delta-pretrain's, a name of conf/backbone, NAME:WEIGHTS, or "
            f"{{use: one of these, taps: [...]}}, or a list of them, got {entry!r}.",
        )
    return entries


# Hidden group: `reg=glob(*)` must sweep methods, not schemas.
SCHEMAS = {
    "schema": {"run": RunConfig},
    "schema/task": {"verification": {"task": "verification"}},  # for data sets of pairs, which bring it
    "schema/dataset": {
        "images": DatasetConfig,
        "drawn": DrawnConfig,
        "dtd": DTDConfig,
        "folder": FolderConfig,
        "glyphs": GlyphsConfig,
        "lfw": LFWConfig,
        "glyph_pairs": GlyphPairsConfig,
    },
    "schema/backbone": {"network": BackboneConfig},
    "schema/reg": {
        "decay": DecayConfig,
        "penalty": RegConfig,
        "l2_sp": L2SPConfig,
        "delta_noatt": DeltaWithoutAttentionConfig,
        "delta": DeltaConfig,
        "afa": AFAConfig,
        "l2t": L2TConfig,
        "lwf": LwFConfig,
        "bss": BSSConfig,
        "l2_sp_fisher": L2SPFisherConfig,
        "lp_ft": LPFTConfig,
        "rifle": RIFLEConfig,
        "stochnorm": StochNormConfig,
        "bi_tuning": BiTuningConfig,
        "pairs": PairsRegConfig,
        "sum": SumConfig,
    },
    "schema/schedule": {"sgd": ScheduleConfig},
}


def check_values(overrides: Sequence[str], config: RunConfig | None = None) -> None:
    """Raise UserError if a command asks for what would be passed over in silence.

    A file of experiment/values that is not there: the group is optional, so that an experiment may ask for
    `<dataset>_<reg>` where only some pairs have values. Beta and weight decay of a sum's term, which are the sum's.
    Iterations of a schedule that counts in epochs.
    """
    if config is not None and (epochs := config.schedule.epochs) is not None:
        for override in overrides:
            require(
                re.match(r"\+*schedule\.iterations=(?!null$)", override) is None,
                f"{override}: this schedule is as long as schedule.epochs={epochs:g} says. To count iterations, add "
                "schedule.epochs=null.",
            )
    for override in overrides:
        term = re.match(r"\+*reg\.terms\.[^.=]+\.(beta|weight_decay)=", override)
        require(term is None, f"{override}: of a sum there is only reg.{term and term[1]}, for all its terms.")
    named = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("experiment/values=")]
    known = GlobalHydra.instance().config_loader().get_group_options("experiment/values")
    for name in named:
        require(name in known, f"experiment/values={name}: there is only {', '.join(known)}.")


def register_schemas() -> None:
    # A dry run writes nothing into results_dir, not even Hydra's record of a sweep.
    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, replace=True)
    store = ConfigStore.instance()
    for group, nodes in SCHEMAS.items():
        for name, node in nodes.items():
            store.store(group=group, name=name, node=node)


def sweep_dir(results_dir: str, dry_run: bool) -> str:
    return str(Path(tempfile.gettempdir()) / "delta-run-dry") if dry_run else f"{results_dir}/sweep"


def to_run_config(composed: DictConfig) -> RunConfig:
    """The composed configuration as checked dataclasses."""
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        require(not missing, f"No value for: {', '.join(missing)}.")
        if OmegaConf.is_dict(terms := OmegaConf.select(composed, "reg.terms")):
            for name in terms:  # checked one by one, for what a message says
                with about_term(name):
                    OmegaConf.to_object(OmegaConf.create({"term": terms[name]}))
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:  # of interpolations, which are resolved only here
        raise UserError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from None
