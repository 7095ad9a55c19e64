"""delta-data doctor: checks what delta-run needs: packages, devices, memory, disk, data sets, weights.

Packages whose installation may be broken, such as torch, are imported only inside the check of them.
"""

import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partialmethod
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from ..common import cores
from ..common.console import Display, log, shorten_list, spelled_out
from ..common.errors import UserError
from ..common.tables import Entry, Table, entries, on_screen
from ..data import load_dataset, look_for, publication
from ..data.examination import examined_before
from ..data.packed_graphs import GraphDataset

if TYPE_CHECKING:
    from ..data.options import DatasetConfig
    from ..engine.config import RunConfig

GIB = 2**30
ENOUGH_DISK, ENOUGH_MEMORY = 5 * GIB, 4 * GIB  # a run of ResNet-50 takes 90 MiB, and trains in 3 GiB on a CPU
PACKAGE = "delta-transfer"


@dataclass
class Findings:
    """The findings, a row each. A trouble keeps delta-run from working; a row about a missing thing says what to do."""

    rows: list[list[Entry]] = field(default_factory=list)

    def add(self, state: str, what: str, words: str) -> None:
        self.rows.append(entries(state, what, spelled_out(words)))

    fine = partialmethod(add, "ok")
    note = partialmethod(add, "note")
    missing = partialmethod(add, "missing")
    optional = partialmethod(add, "optional")
    trouble = partialmethod(add, "TROUBLE")

    @property
    def troubles(self) -> int:
        return sum(state.text == "TROUBLE" for state, *_ in self.rows)

    @contextmanager
    def looking_at(self, what: str) -> Iterator[None]:
        """Makes a finding of every error."""
        try:
            yield
        except Exception as error:
            self.trouble(what, f"{type(error).__name__}: {' '.join(str(error).split())}")


def doctor(overrides: Sequence[str]) -> int:
    """Returns exit status 0 if delta-run can work here. Raises UserError for overrides that are wrong."""
    found = Findings()
    packages(found)
    for what, look in (("torch", torch_and_devices), ("memory", memory)):
        with found.looking_at(what):
            look(found)
    try:
        from .compose import compose_dataset

        config = compose_dataset("folder", overrides)
    except ImportError as error:  # torch, or a package that it needs, is broken
        found.trouble("options", f"cannot be read: {error}")
    else:
        with found.looking_at("disk"):
            disk(found, config)
        with found.looking_at("data sets"):
            data_sets(found, config, overrides)
        with found.looking_at("weights"):
            weights(found, overrides)
    sys.stdout.write(on_screen([Table("", ["state", "of", "what was found"], found.rows, 1)], sys.stdout.isatty()))
    if found.troubles:
        log.info(f"delta-run cannot work here yet: mend what is marked TROUBLE ({found.troubles})")
    else:
        log.info(f"delta-run can work here; {next_step(config, overrides)}")
    return 1 if found.troubles else 0


def next_step(config: "RunConfig", overrides: Sequence[str]) -> str:
    """Says which command comes next: a comparison on the folder of images that the overrides name, or a first run."""
    if config.dataset.reader != "folder" or config.dataset.root is None:
        return "without arguments it makes a first run, on embedded data"
    return f"next: {shlex.join(['delta-run', '+experiment=which_is_best', *overrides, 'budget=45m'])}"


def packages(found: Findings) -> None:
    """Python and what the installed package requires, its extras one by one."""
    try:
        own, needed = version(PACKAGE), [Requirement(text) for text in requires(PACKAGE) or []]
    except PackageNotFoundError:
        found.trouble("package", f"{PACKAGE} is not installed: pip install . in its folder")
        return
    found.fine("versions", f"{PACKAGE} {own}, Python {platform.python_version()}")
    base = [one for one in needed if one.marker is None]
    if lacking := [words for one in base if (words := lacks(one))]:
        found.trouble("packages", f"{'; '.join(lacking)}: pip install {PACKAGE}, or make install in its folder")
    else:
        found.fine("packages", ", ".join(f"{one.name} {version(one.name)}" for one in base))
    extras: dict[str, list[Requirement]] = {}
    for one in needed:
        name = re.search(r'extra == "([\w-]+)"', str(one.marker))
        if name and name[1] != "dev":
            extras.setdefault(name[1], []).append(one)
    for extra, members in extras.items():
        if lacking := [words for one in members if (words := lacks(one))]:
            found.optional(extra, f"{'; '.join(lacking)}: pip install '{PACKAGE}[{extra}]'")
        else:
            found.fine(extra, ", ".join(f"{one.name} {version(one.name)}" for one in members))


def lacks(one: Requirement) -> str | None:
    """Why a package does not meet the requirement; None if it does."""
    try:
        installed = version(one.name)
    except PackageNotFoundError:
        return f"{one.name} is not installed"
    return None if one.specifier.contains(installed, prereleases=True) else f"{one.name} {installed} is not {one}"


def torch_and_devices(found: Findings) -> None:
    import torch
    import torchvision  # noqa: F401 - raises here if its build does not match torch

    from ..engine.devices import keep_to_quota, threads_in_words

    bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    keep_to_quota()  # as a run does
    found.fine("CPU", f"{cores.USABLE} cores, {threads_in_words()}, {bf16} bf16 (precision=bf16)")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        words = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        found.fine(
            f"GPU {index}", words + (", bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "")
        )
    if torch.cuda.device_count():
        return
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        found.missing(
            "GPU", f"torch {torch.__version__} is built without CUDA: install the build that pytorch.org names"
        )
    elif shutil.which("nvidia-smi"):
        found.missing("GPU", f"torch is built for CUDA {torch.version.cuda} and sees none: does nvidia-smi work?")
    else:
        found.missing("GPU", "none: runs use the CPU; take backbone=resnet18 and small images (backbone.image_size)")


def memory(found: Findings) -> None:
    lines = Path("/proc/meminfo")
    if not lines.exists():
        return
    match = re.search(r"^MemAvailable: +(\d+)", lines.read_text(), re.M)
    if match is None:
        return
    available = int(match[1]) * 1024
    if (left := left_to_container()) is not None:
        available = min(available, left)
    words = f"{available / GIB:.1f} GiB available"
    if available < ENOUGH_MEMORY:
        found.missing("memory", f"{words}: little; take backbone=resnet18 or a smaller schedule.batch_size")
    else:
        found.fine("memory", words)


def left_to_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the container may still use; cached files do not count as used. None if there is no limit."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - int(used) + int(statistics["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no container, no limit ("max"), or a file that cannot be read
        return None


def disk(found: Findings, config: "RunConfig") -> None:
    for key in ("results_dir", "cache_dir"):
        folder = Path(getattr(config, key)).absolute()
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        words = f"{key}={getattr(config, key)}: {free / GIB:.1f} GiB free"
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            found.trouble("disk", f"{key}={getattr(config, key)} cannot be written: set {key}=DIR")
        elif free < ENOUGH_DISK:
            found.missing("disk", f"{words}: little; set {key}=DIR on another disk")
        else:
            found.fine("disk", words)


def data_sets(found: Findings, config: "RunConfig", overrides: Sequence[str]) -> None:
    from .compose import compose_dataset
    from .sources import choices

    fetched: list[str] = []
    by_hand: list[str] = []
    named = next((word.removeprefix("dataset=") for word in overrides if word.startswith("dataset=")), "folder")
    asked = any(word.startswith("dataset") for word in overrides)
    words = [word for word in overrides if not word.startswith(("dataset=", "backbone", "reg"))]
    for name in [named] if asked else choices("dataset"):
        dataset = compose_dataset(name, words).dataset
        if name == "folder" and dataset.root is None:
            continue
        called = dataset.name if name == "folder" else name
        remarks: list[str] = []
        counts, _, state, problem = look_for(dataset, remarks.append)
        for sentence in remarks:
            found.note(called, sentence)
        if problem and asked:
            found.trouble(name, problem)
        elif problem:
            found.missing(name, problem)
        elif counts is None:
            (fetched if publication(dataset).download else by_hand).append(name)
        else:
            size = f"{counts.classes:,} classes, {counts.train:,} training and {counts.test:,} test images"
            found.fine(called, f"{state}: {size}, {dataset.root or 'embedded'}")
            if name == named and dataset.root:
                images(found, dataset, Path(config.cache_dir))
    where = f"data_dir={config.data_dir}"
    if fetched:
        found.missing(
            "data sets", f"{', '.join(fetched)}: delta-run dataset=NAME dataset.download=true fetches it ({where})"
        )
    if by_hand:
        what_to_do = f"put them below {where}; delta-data verify NAME says which files, and where they come from"
        found.missing("data sets", f"{', '.join(by_hand)}: {what_to_do}")


def images(found: Findings, config: "DatasetConfig", cache: Path) -> None:
    """Decodes all images of the requested data set, as delta-data verify does, unless none changed since."""
    dataset = load_dataset(config, cache, remark=lambda sentence: None)
    if isinstance(dataset, GraphDataset):  # all graphs were read
        return
    with Display(f"{dataset.name}: decoding images", len(dataset.labels), "image", 5) as display:
        examined = examined_before(dataset, repr(config), display.update)
    if examined.unreadable:
        words = shorten_list([f"{dataset.names[index]} ({why})" for index, why in examined.unreadable.items()])
        remedy = "mend or remove them, or set dataset.unreadable=skip"
        found.trouble(dataset.name, f"images that cannot be read: {len(examined.unreadable):,} ({words}); {remedy}")
    for line in examined.lines():
        found.note(dataset.name, line)


def weights(found: Findings, overrides: Sequence[str]) -> None:
    """Looks for weights of torchvision's networks in its cache, and at the file that was named."""
    import torch

    from ..models.zoo import build_source, not_downloaded
    from ..records.weights import is_file_name
    from .compose import compose_dataset
    from .sources import named_backbone, networks

    file = next((word.partition("=")[2] for word in overrides if word.startswith("backbone.weights=")), None)
    given = any(word.startswith("backbone=") for word in overrides)
    if file and not given and is_file_name(file):
        which_fits(found, file)
        return
    if given:
        backbone = compose_dataset("folder", overrides).backbone
        reason = not_downloaded(backbone)
        if reason:
            found.missing(
                backbone.name, f"{reason}; without internet access fetch it elsewhere, and set backbone.weights=FILE"
            )
            return
        try:
            build_source(backbone, 0, tapped=False)
            found.fine(backbone.name, f"weights {backbone.weights}")
        except UserError as error:
            found.trouble(backbone.name, str(error))
        return
    here: list[str] = []
    absent: list[str] = []
    for name in networks():
        backbone = named_backbone(name)
        if backbone.weights.startswith("IMAGENET"):
            (absent if not_downloaded(backbone) else here).append(name)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if here:
        found.fine("weights", f"{', '.join(here)}: in {cache}")
    if absent:
        words = f"{', '.join(absent)}: delta-run downloads them into {cache}; or set backbone.weights=FILE"
        found.missing("weights", words)


def which_fits(found: Findings, file: str) -> None:
    """Finds the networks that a file of weights fits."""
    from ..models.portable import bare_network
    from ..models.zoo import read_weights
    from .sources import named_backbone, networks

    fitting = []
    for name in networks():
        backbone = named_backbone(name).replace(weights=file)
        state = read_weights(backbone) or {}  # a file that cannot be read is a finding
        head = state.get(f"{backbone.head}.weight")
        with suppress(RuntimeError):
            if head is not None:
                bare_network(backbone, len(head), state)
                fitting.append(f"backbone={name}")
    if fitting:
        found.fine("weights", f"{file}: fits {', '.join(fitting)}")
    else:
        found.trouble("weights", f"{file} fits no network of conf/backbone; name one, backbone=NAME, to see why")
