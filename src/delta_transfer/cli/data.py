"""delta-data: finds data sets, checks that they are complete, and makes their image stores.

    delta-data list [data_dir=/data]
    delta-data verify cub [dataset.root=/data/CUB_200_2011]
    delta-data prepare cub [backbone=inception_v3] [schedule=paper_augmented] [dataset.download=true]
    delta-data taps backbone=timm backbone.name=convnext_tiny
    delta-data doctor [data_dir=/data] [dataset.root=photos] [backbone.weights=FILE]

NAME is a file of conf/dataset; key=value are overrides as delta-run takes them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.console import Display, command_parser, log, shorten_list, stoppable
from ..common.tables import Entry, Table, entries, on_screen
from ..data import fetch, load_dataset, locate, look_for, publication
from ..data.archives import unpack_archives
from ..data.dataset import Dataset, counts_of, expected_counts
from ..data.examination import examine
from ..data.options import Counts
from ..data.packed_graphs import GraphDataset
from ..data.store import open_store, store_path, wrong_checksums
from ..records.files import make_output_folder
from .doctor import doctor

if TYPE_CHECKING:
    from ..engine.config import RunConfig

MORE = """\
examples:
  delta-data list data_dir=/data                 which data sets are complete
  delta-data verify folder dataset.root=photos   are all my images readable?
  delta-data prepare cub data_dir=/data && delta-run dataset=cub data_dir=/data

files:
  DELTA_DATA, or data_dir=DIR    the data sets, each in the folder that its
                                 publisher names (default: data)
  results/cache/stores/          decoded images; you may remove them

exit status:
  0  fine
  1  something is missing, unreadable, damaged or superfluous; a message says it
  2  an unknown command or option
"""


@stoppable
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "list":
        show_list(args.overrides)
        return 0
    if args.command == "doctor":
        return doctor(args.overrides)
    if args.command == "taps":
        show_taps(args.overrides)
        return 0
    from .compose import compose_dataset  # imports torch

    config = compose_dataset(args.name, args.overrides)
    return {"verify": verify, "prepare": prepare}[args.command](config)


def parser() -> argparse.ArgumentParser:
    p = command_parser("delta-data", __doc__, MORE)
    commands = p.add_subparsers(dest="command", required=True)
    for name, text in (
        ("list", "every data set: official and found counts, where, ready or not"),
        ("verify", "compare counts with the official ones; find images that are unreadable, empty or there twice"),
        ("doctor", "what delta-run needs: what is here, what is missing, and what to do about it"),
        ("taps", "the layers of a network whose feature maps can be tapped, with their shapes"),
        ("prepare", "unpack the publisher's archives, decode every image once into the store that runs read"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        if name in ("verify", "prepare"):
            command.add_argument("name", metavar="NAME", help="a name that delta-data list shows")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="as for delta-run")
    return p


def show_taps(overrides: Sequence[str]) -> None:
    """A line for each layer: its name, its class and the shape of its output; those that are tapped are marked."""
    from ..models.named import tappable  # imports torch
    from .compose import compose_dataset

    backbone = compose_dataset("glyphs", overrides).backbone

    log.info(
        f"{backbone.name}: {backbone.image_size} pixels of {backbone.resize}, {backbone.interpolation}, mean "
        f"{backbone.mean}, std {backbone.std}, head {backbone.head}, maps {backbone.layout}"
    )
    entries = tappable(backbone)
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        shape = " x ".join(map(str, entry.shape))
        log.info(f"{'*' if entry.name in backbone.taps else ' '} {entry.name:{width}}  {shape:14}  {entry.kind}")
    log.info(f"* tapped: backbone.taps=[{','.join(backbone.taps)}]")


def show_list(overrides: Sequence[str]) -> None:
    from .compose import compose_dataset
    from .sources import choices

    rows, troubles = [], []
    for name in choices("dataset"):
        config = compose_dataset(name, overrides).dataset
        counts, official, state, trouble = look_for(config)
        if trouble:
            troubles.append(f"{name}: {trouble}")
        cells = [_found_of(counts, official, key) for key in ("classes", "train", "test")]
        rows.append(entries(name, *cells, state, config.root or ""))
    header = ["name", "classes", "train", "test", "status", "root"]
    table = Table("", header, rows, 1, notes=["found / official; one number where they agree"])
    sys.stdout.write(on_screen([table], sys.stdout.isatty()))
    for trouble in troubles:
        log.info(trouble)


def _found_of(counts: Counts | None, official: Counts | None, key: str) -> Entry:
    """Found / official; one number if they agree or only one is known."""
    numbers = [f"{getattr(c, key):,}" for c in (counts, official) if c is not None]
    if counts is None and official is not None:
        numbers = ["-", *numbers]
    return Entry(" / ".join(dict.fromkeys(numbers)), getattr(counts or official, key, None))


# --- verify ---------------------------------------------------------------------------------------------------------


def verify(config: "RunConfig") -> int:
    """Exit status 0: every image decodes, and no count is larger than the publisher's."""
    cache = Path(config.cache_dir)
    dataset = load_dataset(config.dataset, cache)
    counts, official = counts_of(dataset), expected_counts(config.dataset)
    state = counts.against(official)
    log.info(f"{config.dataset.name}: {publication(config.dataset).title}, {config.dataset.root or 'embedded'}")
    for key in ("classes", "train", "test"):
        expected = f" of {getattr(official, key):,}" if official else ""
        log.info(f"  {key:8} {getattr(counts, key):,}{expected}")
    if state == "subset":
        log.info("  a subset of the official data set: results on it do not compare with published ones")
    elif state != "ready":
        log.info("  more than the official data set holds: is another one mixed in?")

    if isinstance(dataset, GraphDataset):  # all graphs were read above
        return int(state == "more than official")
    with Display(f"{dataset.name}: decoding images", len(dataset.labels), "image", 5) as display:
        found = examine(dataset, display.update)
    if found.unreadable:
        words = "; ".join(f"{dataset.names[index]} ({why})" for index, why in found.unreadable.items())
        log.info(f"  images   {len(found.unreadable)} of {len(dataset.labels):,} cannot be read: {words}")
    else:
        log.info(f"  images   {len(dataset.labels):,} decode")
    for line in found.lines():
        log.info(f"  {line}")
    damaged = _damaged_in_store(dataset, store_path(dataset, config.backbone.resize, config.resizing, cache))
    return 1 if found.unreadable or damaged or state == "more than official" else 0


def _damaged_in_store(dataset: Dataset, path: Path) -> bool:
    """Compares the checksums of the store that runs read, if it was built."""
    if not path.exists():
        return False
    try:
        wrong = [dataset.names[index] for index in wrong_checksums(path)]
    except (OSError, ValueError) as error:
        wrong = [str(error)]
    log.info(
        f"  store    {path.name}: " + (f"damaged, remove it: {shorten_list(wrong)}" if wrong else "as it was built")
    )
    return bool(wrong)


# --- prepare --------------------------------------------------------------------------------------------------------


def prepare(config: "RunConfig") -> int:
    """Downloads on request, unpacks, and builds the store that `delta-run` reads with the same overrides."""
    published = publication(config.dataset)
    root = locate(published, Path(config.dataset.root).expanduser()) if config.dataset.root else None
    if config.dataset.download:
        fetch(published, root)
        config.dataset.download = False
    if root and published.archives:
        for archive in unpack_archives(published.needs, published.archives, root):
            log.info(f"unpacked {archive}")
    size, aspect, cache = config.backbone.resize, config.resizing, Path(config.cache_dir)
    dataset = load_dataset(config.dataset, cache)
    if isinstance(dataset, GraphDataset):
        log.info(f"{config.dataset.name}: {len(dataset.labels):,} graphs, which runs read as they are")
        return 0
    make_output_folder(cache)
    with Display(f"{dataset.name}: decoding images", len(dataset.labels), "image", 5) as display:
        store = open_store(dataset, size, aspect, cache, display.update)
    shape = f"{size} x {size} pixels" if aspect.startswith("squash") else f"shorter side {size} pixels"
    log.info(
        f"{config.dataset.name}: {len(dataset.labels):,} images, {shape}, {store.pixels.nbytes / 2**20:,.0f} MiB in "
        f"{store_path(dataset, size, aspect, cache)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
