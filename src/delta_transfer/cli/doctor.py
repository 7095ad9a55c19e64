"""delta-data doctor: what is here for delta-run (packages, devices, memory, disk, data sets, weights), what is missing.

What may be broken, as an installation of torch, is imported where it is looked at.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from ..common.console import log
from ..common.errors import UserError
from ..config import RunConfig

GIB = 2**30
ENOUGH_DISK, ENOUGH_MEMORY = 5 * GIB, 4 * GIB  # ResNet-50 leaves 90 MiB a run, and trains in 3 GiB on a CPU
PACKAGE = "delta-transfer"
WEIGHT_FILES = (".pth", ".pt", ".safetensors")


@dataclass
class Findings:
    """One line each. A trouble is what delta-run cannot work with; what is merely missing comes with what to do."""

    lines: list[str] = field(default_factory=list)
    troubles: int = 0

    def fine(self, what: str, words: str) -> None:
        self.lines.append(f"ok       {what:10} {words}")

    def missing(self, what: str, words: str) -> None:
        self.lines.append(f"missing  {what:10} {words}")

    def trouble(self, what: str, words: str) -> None:
        self.lines.append(f"TROUBLE  {what:10} {words}")
        self.troubles += 1

    @contextmanager
    def looking_at(self, what: str) -> Iterator[None]:
        """Whatever goes wrong in it is a finding."""
        try:
            yield
        except Exception as error:
            self.trouble(what, f"{type(error).__name__}: {' '.join(str(error).split())}")


def doctor(config: RunConfig, overrides: Sequence[str]) -> int:
    """Exit status 0: delta-run can work here."""
    found = Findings()
    packages(found)
    for what, look in (("torch", torch_and_devices), ("memory", memory)):
        with found.looking_at(what):
            look(found)
    with found.looking_at("disk"):
        disk(found, config)
    with found.looking_at("data sets"):
        data_sets(found, config, overrides)
    with found.looking_at("weights"):
        weights(found, overrides)
    for line in found.lines:
        log.info(line)
    if found.troubles:
        log.info(f"delta-run cannot work here yet: {found.troubles} to mend, marked TROUBLE")
    else:
        log.info("delta-run can work here; without arguments it makes a first run, on embedded data")
    return 1 if found.troubles else 0


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
            found.missing(extra, f"{'; '.join(lacking)}: pip install '{PACKAGE}[{extra}]', if you want it")
        else:
            found.fine(extra, ", ".join(f"{one.name} {version(one.name)}" for one in members))


def lacks(one: Requirement) -> str | None:
    """What is wrong with an installed package; None if nothing is."""
    try:
        installed = version(one.name)
    except PackageNotFoundError:
        return f"{one.name} is not installed"
    return None if one.specifier.contains(installed, prereleases=True) else f"{one.name} {installed} is not {one}"


def torch_and_devices(found: Findings) -> None:
    import torch
    import torchvision  # noqa: F401 - of another build than torch it raises here

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    found.fine("CPU", f"{cores} cores, {torch.get_num_threads()} threads, {bf16} bf16 (precision=bf16)")
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
    available = int(re.search(r"^MemAvailable: +(\d+)", lines.read_text(), re.M)[1]) * 1024
    if (left := left_to_container()) is not None:
        available = min(available, left)
    words = f"{available / GIB:.1f} GiB available"
    if available < ENOUGH_MEMORY:
        found.missing("memory", f"{words}: little; take backbone=resnet18 or a smaller schedule.batch_size")
    else:
        found.fine("memory", words)


def left_to_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes below its limit, what is only cached not counted as used; None where there is no limit."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = int(re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.M)[1])
        return max(0, int(limit) - int(used) + cached)
    except (OSError, ValueError, TypeError):  # no container, no limit ("max"), or not to be read
        return None


def disk(found: Findings, config: RunConfig) -> None:
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


def data_sets(found: Findings, config: RunConfig, overrides: Sequence[str]) -> None:
    from ..data import DATASETS
    from .data import choices, composed, look_for

    absent = []
    # dataset.root names the folder of one data set; the others are looked for below data_dir.
    named = next((word.removeprefix("dataset=") for word in overrides if word.startswith("dataset=")), "folder")
    for name in choices():
        of_others = ("dataset=", "backbone", "reg") if name == named else ("dataset", "backbone", "reg")
        dataset = composed(name, [word for word in overrides if not word.startswith(of_others)]).dataset
        if name == "folder" and dataset.root is None:
            continue
        counts, _, state, problem = look_for(dataset)
        if problem and name == named:  # which was asked for
            found.trouble(name, problem)
        elif problem:
            found.missing(name, problem)
        elif counts is None:
            absent.append(name)
        else:
            size = f"{counts.classes:,} classes, {counts.train:,} training and {counts.test:,} test images"
            found.fine(name, f"{state}: {size}, {dataset.root or 'embedded'}")
    fetched = [name for name in absent if DATASETS[composed(name, []).dataset.name].download]
    by_hand = [name for name in absent if name not in fetched]
    where = f"data_dir={config.data_dir}"
    if fetched:
        found.missing(
            "data sets", f"{', '.join(fetched)}: delta-run dataset=NAME dataset.download=true fetches it ({where})"
        )
    if by_hand:
        words = f"{', '.join(by_hand)}: to be put below {where}; delta-data verify NAME says which files, and whence"
        found.missing("data sets", words)


def weights(found: Findings, overrides: Sequence[str]) -> None:
    """Of torchvision's networks, in its cache, and the file that was named."""
    import torch

    from ..models.zoo import build_source, not_downloaded
    from .data import choices as of
    from .data import composed

    file = next((word.partition("=")[2] for word in overrides if word.startswith("backbone.weights=")), None)
    given = any(word.startswith("backbone=") for word in overrides)
    if file and not given and Path(file).suffix in WEIGHT_FILES:
        which_fits(found, file)
        return
    if given:
        backbone = composed("folder", overrides).backbone
        reason = not_downloaded(backbone)
        if reason:
            found.missing(
                backbone.name, f"{reason}; without a network fetch it elsewhere, and set backbone.weights=FILE"
            )
            return
        try:
            build_source(backbone, 0, tapped=False)
            found.fine(backbone.name, f"weights {backbone.weights}")
        except UserError as error:
            found.trouble(backbone.name, str(error))
        return
    here, absent = [], []
    for name in of("backbone"):
        backbone = composed("folder", [f"backbone={name}"]).backbone
        if backbone.weights.startswith("IMAGENET"):
            (absent if not_downloaded(backbone) else here).append(name)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if here:
        found.fine("weights", f"{', '.join(here)}: in {cache}")
    if absent:
        words = f"{', '.join(absent)}: delta-run downloads them into {cache}; or set backbone.weights=FILE"
        found.missing("weights", words)


def which_fits(found: Findings, file: str) -> None:
    """Of which networks a file of weights is."""
    from ..models.zoo import bare_network, read_weights
    from .data import choices, composed

    fitting = []
    for name in choices("backbone"):
        backbone = composed("folder", [f"backbone={name}", f"backbone.weights={file}"]).backbone
        state = read_weights(backbone)  # the first time too: what is wrong with the file is a finding
        head = state.get(f"{backbone.head}.weight")
        with suppress(RuntimeError):
            if head is not None:
                bare_network(backbone.name, len(head), state)
                fitting.append(f"backbone={name}")
    if fitting:
        found.fine("weights", f"{file}: fits {', '.join(fitting)}")
    else:
        found.trouble("weights", f"{file}: of no network of conf/backbone; name one, backbone=NAME, to see why")


if __name__ == "__main__":
    from .data import main

    sys.exit(main(["doctor", *sys.argv[1:]]))
