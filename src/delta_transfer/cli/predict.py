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
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.console import Display, log, stoppable
from ..common.errors import UserError
from ..common.untrusted import no_formula, spelled_out

if TYPE_CHECKING:
    import numpy as np

    from ..inspect.finished import Finished

PLAIN_WIDTH = 100_000  # columns: a pipe or a file has no edge at which to wrap a table


@dataclass(frozen=True)
class Prediction:
    image: str
    classes: list[int]  # the most probable first
    probabilities: list[float]


@dataclass(frozen=True)
class Found:
    """Of all images, in the order in which they were named."""

    run_id: str
    class_names: Sequence[str] | None
    predictions: list[Prediction]
    refused: dict[str, str]  # image: why

    def name(self, index: int) -> str:
        return self.class_names[index] if self.class_names else str(index)


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
            from ..records.files import write_atomically

            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.output, text.encode())
        else:
            sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal or pipe of another encoding lacks
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
    """Says on stderr which images were refused, and why."""
    from ..engine.devices import pick_device  # imports torch
    from ..inspect.finished import finished, run_folder

    run = finished(run_folder(args.run))
    files, refused = files_of(args.images)
    predictions = []
    title = f"{run.run_id}: predicting"
    with Display(title, len(files), "image") if sys.stderr.isatty() else nullcontext() as display:
        outcomes = probabilities(run, files, pick_device(args.device), args.batch_size) if files else ()
        for done, (file, outcome) in enumerate(outcomes, 1):
            if isinstance(outcome, BaseException):
                refused[spelled_out(str(file))] = f"no image that can be read ({spelled_out(first_line(outcome))})"
            else:
                best = (-outcome).argsort(kind="stable")[: args.top]
                predictions.append(Prediction(spelled_out(str(file)), best.tolist(), outcome[best].tolist()))
            if display:
                display.update(done)
    for image, why in refused.items():
        log.error(f"{image}: {why}")
    if run.class_names is None:
        log.info(f"{run.run_id} was made by a version that did not record class names: classes are numbers, from 0")
    return Found(run.run_id, run.class_names, predictions, refused)


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def files_of(named: Sequence[Path]) -> tuple[list[Path], dict[str, str]]:
    """The images, each once, in the order of `named`; and what is none, with the reason."""
    from ..data.readers.folder import SUFFIXES, images_below, other_pictures_below

    files: dict[Path, None] = {}
    refused = {}
    for path in named:
        if path.is_dir():
            below = images_below(path)
            files |= dict.fromkeys(below)
            others = other_pictures_below(path)
            refused |= {spelled_out(str(other)): "a format that is not read here: convert to .jpg" for other in others}
            if not below + others:
                refused[spelled_out(str(path))] = f"a folder without an image ({', '.join(sorted(SUFFIXES))})"
        elif path.exists():
            files[path] = None
        else:
            refused[spelled_out(str(path))] = "there is no such file or folder"
    return list(files), refused


def probabilities(
    run: "Finished", files: Sequence[Path], device, batch_size: int | None
) -> "Iterator[tuple[Path, np.ndarray | BaseException]]":
    """(K,) of each file, or why there are none, in order: by the code that the run was tested with.

    On a CPU in fp32, whatever a GPU tested it in.
    """
    import numpy as np
    import torch

    from ..common.hardware import images_at_once
    from ..data.dataset import Dataset
    from ..data.files import read_image
    from ..data.store import Store, decoded
    from ..engine.loop import outputs_of
    from ..experiment.experiment import loader_of

    network = run.network.to(device, memory_format=torch.channels_last)
    precision = run.config.precision if device.type == "cuda" else "fp32"
    nobody = np.full(len(files), -1)  # labels
    names = tuple(map(str, files))
    images = Dataset("images", (), nobody, nobody < 0, names, lambda index: read_image(files[index]), listing="")
    outcomes = decoded(images, run.config.backbone.resize, run.config.schedule.aspect)
    at_once = batch_size or images_at_once(device)
    while part := list(islice(outcomes, batch_size or at_once)):
        readable = [index for index, image in part if not isinstance(image, BaseException)]
        found = dict(part)
        if readable:
            loader = loader_of(run.config, Store.of([found[index] for index in readable]), nobody, device)
            loader.images_at_once = at_once
            logits, _ = outputs_of(network, loader, np.arange(len(readable)), precision, "logits")
            at_once = loader.images_at_once  # fewer, if memory did not suffice
            found |= dict(zip(readable, logits.double().softmax(dim=1).numpy(), strict=True))
        for index, outcome in found.items():
            yield files[index], outcome


# --- what is printed ---


def as_table(found: Found, terminal: bool) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not found.predictions:
        return ""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for one in found.predictions:
        for rank, (index, probability) in enumerate(zip(one.classes, one.probabilities, strict=True)):
            cells = ["" if rank else one.image, found.name(index), f"{100 * probability:.1f} %"]
            table.add_row(*map(Text, cells))  # Text: a name with [brackets] is not markup
    file, width = (None, None) if terminal else (io.StringIO(), PLAIN_WIDTH)
    console = Console(file=file, highlight=False, width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def as_csv(found: Found, terminal: bool) -> str:
    """A line per image and class."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["image", "rank", "index", "class", "probability"])
    for one in found.predictions:
        for rank, (index, probability) in enumerate(zip(one.classes, one.probabilities, strict=True), 1):
            line = [one.image, rank, index, found.name(index), round(probability, 6)]
            out.writerow(map(no_formula, line))
    return text.getvalue()


def as_json(found: Found, terminal: bool) -> str:
    images = [
        {
            "image": one.image,
            "classes": [
                {"index": index, "class": found.name(index), "probability": round(probability, 6)}
                for index, probability in zip(one.classes, one.probabilities, strict=True)
            ],
        }
        for one in found.predictions
    ]
    refused = [{"image": image, "reason": why} for image, why in found.refused.items()]
    made = {"run_id": found.run_id, "images": images, "refused": refused}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


FORMATS = {"table": as_table, "csv": as_csv, "json": as_json}


if __name__ == "__main__":
    sys.exit(main())
