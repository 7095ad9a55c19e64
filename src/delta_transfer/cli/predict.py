"""delta-predict: what a finished run's network says of your own images.

    delta-predict RUN photo.jpg                                       # class names and probabilities, as a table
    delta-predict RUN photos --top 1 --format csv --output found.csv  # a folder, searched at any depth
    delta-predict RUN a.png b.png --format json --device cpu

RUN is a run's folder (results/runs/...) or its name below results/runs. Its network alone is needed, neither its data
set nor its source weights. Images are resized, cropped and normalised as the run's own test images were (ten crops,
where it was tested on ten); probabilities are the softmax of its logits.

In folders, images are the files that dataset=folder takes (.jpg, .png, ...), what is hidden left out. A file that is no
image, is damaged, or is of another format (.heic, ...), is named on stderr, and the others are predicted.

Exit status: 0 if all images were predicted; 1 if one was not, or nothing could be done; 2 for a wrong command line.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..common.console import Display, log, spelled_out, stoppable
from ..common.errors import UserError
from ..common.tables import UNCUT
from ..common.untrusted import no_formula
from ..records.files import make_output_folder, write_atomically


@dataclass(frozen=True)
class Found:
    """The outcome for all images, in the order in which they were named."""

    run_id: str
    images: list[dict[str, Any]]  # image; classes, the most probable first: index, class, probability of each
    refused: dict[str, str]  # image: why


@stoppable
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.output and args.output.is_dir():
            raise UserError(f"--output {args.output} is a folder: name a file in it.")
        with redirect_stdout(sys.stderr):  # stdout is for the result alone
            found = predict(args)
        text = FORMATS[args.format](found, terminal=not args.output and sys.stdout.isatty())
        if args.output:
            make_output_folder(args.output.parent)
            write_atomically(args.output, text.encode())
        else:
            if isinstance(sys.stdout, io.TextIOWrapper):  # letters that its encoding lacks become their numbers
                sys.stdout.reconfigure(errors="backslashreplace")
            sys.stdout.write(text)
    except (UserError, OSError) as error:
        log.error(str(error))
        return 1
    return 1 if found.refused else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="delta-predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", metavar="RUN", help="a run's folder, or its name below results/runs")
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="image files; folders of them")
    p.add_argument("--format", choices=list(FORMATS), default="table", help="default: a table to read")
    p.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to stdout")
    p.add_argument("--top", type=positive, default=3, metavar="K", help="so many classes of each image (default: 3)")
    p.add_argument(
        "--batch-size", type=positive, metavar="N", help="images at once (default: 256 on a GPU, a few on a CPU)"
    )
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one")
    return p


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def predict(args: argparse.Namespace) -> Found:
    """Predicts all images. Reports on stderr which images were refused, and why."""
    from ..engine.devices import pick_device  # imports torch
    from ..inspect.finished import finished, run_folder
    from ..inspect.predict import probabilities

    run = finished(run_folder(args.run))
    files, refused = files_of(args.images)
    images = []
    title = f"{run.run_id}: predicting"
    with Display(title, len(files), "image") if sys.stderr.isatty() else nullcontext() as display:
        outcomes = probabilities(run, files, pick_device(args.device), args.batch_size) if files else ()
        for done, (file, outcome) in enumerate(outcomes, 1):
            image = spelled_out(str(file))
            if isinstance(outcome, BaseException):
                refused[image] = f"no image that can be read ({spelled_out(first_line(outcome))})"
            else:
                best = (-outcome).argsort(kind="stable")[: args.top].tolist()
                classes = [
                    {"index": index, "class": run.class_names[index], "probability": round(float(outcome[index]), 6)}
                    for index in best
                ]
                images.append({"image": image, "classes": classes})
            if display:
                display.update(done)
    for image, why in refused.items():
        log.error(f"{image}: {why}")
    return Found(run.run_id, images, refused)


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def files_of(named: Sequence[Path]) -> tuple[list[Path], dict[str, str]]:
    """The images, each once, in the order of `named`; and those that cannot be predicted, with the reason."""
    from ..data.tree import list_images  # imports Pillow

    files: dict[Path, None] = {}
    refused: dict[str, str] = {}
    for path in named:
        if path.is_dir():
            listing = list_images(path)
            files |= dict.fromkeys(path / image for image in listing.images)
            refused |= {spelled_out(str(path / name)): f"left out, {why}" for name, why in listing.left_out.items()}
            if not listing.images:
                refused[spelled_out(str(path))] = "a folder without an image"
        elif path.exists():
            files[path] = None
        else:
            refused[spelled_out(str(path))] = "there is no such file or folder"
    return list(files), refused


# --- Output ---------------------------------------------------------------------------------------------------------


def as_table(found: Found, terminal: bool) -> str:
    if not found.images:
        return ""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for image in found.images:
        for rank, found_class in enumerate(image["classes"]):
            percent = f"{100 * found_class['probability']:.1f} %"
            # Text: a name with [brackets] is not markup
            table.add_row(*map(Text, ["" if rank else image["image"], found_class["class"], percent]))
    console = Console(file=None if terminal else io.StringIO(), highlight=False, width=None if terminal else UNCUT)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def as_csv(found: Found, terminal: bool) -> str:
    """One line for each image and class."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["image", "rank", "index", "class", "probability"])
    for image in found.images:
        for rank, found_class in enumerate(image["classes"], 1):
            out.writerow(map(no_formula, [image["image"], rank, *found_class.values()]))
    return text.getvalue()


def as_json(found: Found, terminal: bool) -> str:
    refused = [{"image": image, "reason": why} for image, why in found.refused.items()]
    made = {"run_id": found.run_id, "images": found.images, "refused": refused}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


FORMATS = {"table": as_table, "csv": as_csv, "json": as_json}


if __name__ == "__main__":
    sys.exit(main())
