"""delta-predict: classifies your own images with a finished run's network.

    delta-predict RUN photo.jpg                                       # class names and probabilities, as a table
    delta-predict RUN photos --top 1 --format csv --output found.csv  # a folder, searched at any depth
    delta-predict RUN a.png b.png --format json --device cpu
    delta-predict RUN @list.txt                                       # the files and folders that its lines name
    find photos -name '*.jpg' | delta-predict RUN -                   # the same from standard input
    delta-predict RUN molecules.csv                                   # of a run on molecules: a column of SMILES

RUN is a run's folder (results/runs/...) or its name below results/runs. The command needs only the run's network, and
neither its data set nor its source weights. It resizes, crops and normalises images as the run's own test images were
(ten crops, if the run was tested on ten). Probabilities are the softmax of the logits.

In folders it takes the files that dataset=folder takes (.jpg, .png, ...), without hidden ones. It names on stderr each
file that is not an image, is damaged, or has another format (.heic, ...), and classifies the others. Images of more
than 8 bits need --scale, unless the run had dataset.scale.

If images are in folders with the names of the run's classes, stderr says how many are predicted right, and which
classes are taken for which; --format json has this as "labelled".

CSV is safe to open in a spreadsheet: a class name that a spreadsheet would compute gets an apostrophe. Such a file name
gets ./ in front, which names the same file. --exact writes both unchanged, for programs; JSON always does.

Exit status: 0 if all images were predicted; 1 if one was not, or nothing could be done; 2 for a wrong command line.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import sys
import unicodedata
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..common.console import Display, command_parser, log, no_formula, shorten_list, spelled_out, stoppable
from ..common.errors import UserError, in_words
from ..common.tables import Entry, Table, entries, on_screen
from ..records.files import check_output, make_output_folder, write_atomically
from .predict_molecules import FORMATS as OF_MOLECULES
from .predict_molecules import FoundMolecules, predict_molecules

if TYPE_CHECKING:
    from ..inspect.finished import Finished


MOST = 1_000_000_000  # of a number on the command line


@dataclass(frozen=True)
class Found:
    """The outcome for all images, in the order in which they were named."""

    run_id: str
    images: list[dict[str, Any]]  # image; classes, the most probable first: index, class, probability of each
    refused: dict[str, str]  # image: why
    left_out: dict[str, str]  # file in a folder that is not an image: why
    labelled: dict[str, Any] | None  # how many images of named classes are predicted right; None without any


@stoppable
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.output and args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder: name a file in it.")
    if args.output:
        check_output(args.output)
    with redirect_stdout(sys.stderr):  # stdout is only for the result
        found: Any = predict(args)
    terminal = not args.output and sys.stdout.isatty()
    text = (OF_MOLECULES if isinstance(found, FoundMolecules) else FORMATS)[args.format](found, terminal, args.exact)
    if args.output:
        make_output_folder(args.output.parent)
        write_atomically(args.output, text.encode())
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):  # escapes letters that its encoding lacks
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(text)
    return 1 if found.refused else 0


def parser() -> argparse.ArgumentParser:
    p = command_parser("delta-predict", __doc__)
    p.add_argument("run", metavar="RUN", help="a run's folder, or its name below results/runs")
    p.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE_OR_FOLDER",
        help="image files; folders; @FILE or -: a list of both, one per line, in a file or on standard input; for a "
        "run on molecules: CSV files with a column of SMILES",
    )
    p.add_argument("--format", choices=list(FORMATS), default="table", help="default: a table to read")
    p.add_argument("--exact", action="store_true", help="in CSV: names unchanged, for programs, not spreadsheets")
    p.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to stdout")
    p.add_argument("--top", type=positive, metavar="K", help="number of classes for each image (default: 3)")
    p.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="images that the network computes at once (default: 256 on a GPU, a few on a CPU)",
    )
    p.add_argument(
        "--scale", type=scale, help="dataset.scale for these images: full, minmax or a number (default: the run's)"
    )
    p.add_argument("--max-pixels", type=positive, metavar="N", help="dataset.max_pixels for these images")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one")
    return p


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number in 1..{MOST:,}")
    return int(text)


def scale(text: str) -> str | float:
    value = text if text in ("full", "minmax") else float(text)
    if not isinstance(value, str) and not 0 < value < math.inf:
        raise ValueError(text)
    return value


def as_options(text: str) -> str:
    """Advice for delta-run, such as dataset.max_pixels=N, as options of this command."""
    return re.sub(r"dataset\.(scale|max_pixels)(=?)", lambda m: f"--{m[1].replace('_', '-')}{' ' * len(m[2])}", text)


def predict(args: argparse.Namespace) -> Found | FoundMolecules:
    from ..inspect.finished import finished, run_folder  # imports torch

    run = finished(run_folder(args.run))
    return predict_molecules(run, args) if run.config.backbone.inputs == "graphs" else predict_images(run, args)


def predict_images(run: "Finished", args: argparse.Namespace) -> Found:
    """Predicts all images. Reports on stderr which images were refused, and why."""
    from ..data.examination import only_first_pictures
    from ..data.images import Reading, holds_several_pictures
    from ..engine.devices import pick_device  # imports torch
    from ..inspect.predict import probabilities

    files, refused, left_out = files_of(expanded(args.images), run.class_names)
    if args.output and args.output.resolve() in {file.resolve() for file in files}:
        raise UserError(f"--output {args.output} is one of the images: choose another file.")
    images, outcome_of = [], {}
    title = f"{run.run_id}: predicting"
    with Display(title, len(files), "image") if sys.stderr.isatty() else nullcontext() as display:
        configured = run.config.dataset
        reading = Reading(args.scale or configured.scale, args.max_pixels or configured.max_pixels)
        outcomes = probabilities(run, list(files), reading, pick_device(args.device), args.batch_size) if files else ()
        for done, (file, outcome) in enumerate(outcomes, 1):
            image = spelled_out(str(file))
            if isinstance(outcome, BaseException):
                refused[image] = (
                    f"no image that can be read ({as_options(spelled_out(in_words(outcome).splitlines()[0]))})"
                )
            else:
                best = (-outcome).argsort(kind="stable")[: args.top or 3].tolist()
                classes = [
                    {"index": index, "class": run.class_names[index], "probability": round(float(outcome[index]), 6)}
                    for index in best
                ]
                images.append({"image": image, "classes": classes})
                outcome_of[file] = classes[0]["class"]
            if display:
                display.update(done)
    for image, why in refused.items():
        log.error(f"{image}: {why}")
    if left_out:
        log.info(f"left out: {len(left_out)}: {shorten_list([f'{name} ({why})' for name, why in left_out.items()])}")
    if several := [spelled_out(str(file)) for file in outcome_of if holds_several_pictures(file)]:
        log.info(only_first_pictures(several))
    labelled = compared(files, outcome_of)
    if labelled:
        log.info(
            f"{labelled['n']} of {len(files)} images are in folders with names of classes: "
            f"{labelled['right']} of them ({labelled['accuracy']:.1f} %) are predicted right"
        )
        worst = [f"{one['class']} as {one['predicted']} ({one['n']})" for one in labelled["confused"]]
        if worst:
            log.info(f"taken for another class: {shorten_list(worst)}")
    return Found(run.run_id, images, refused, left_out, labelled)


def compared(truth: dict[Path, str | None], predicted: dict[Path, str]) -> dict[str, Any] | None:
    """Counts and accuracy in percent, and which classes are taken for which, the most frequent first."""
    pairs = [(name, predicted[file]) for file, name in truth.items() if name is not None and file in predicted]
    if not pairs:
        return None
    confused = Counter(pair for pair in pairs if pair[0] != pair[1])
    right = len(pairs) - confused.total()
    return {
        **{"n": len(pairs), "right": right, "accuracy": 100 * right / len(pairs)},
        "confused": [{"class": a, "predicted": b, "n": n} for (a, b), n in confused.most_common()],
    }


def expanded(named: Sequence[str]) -> list[Path]:
    """The paths of the command line, in which each list is replaced by the paths that it names."""
    paths: list[Path] = []
    for name in named:
        if name != "-" and not name.startswith("@") or name == "@":
            paths.append(Path(name))
            continue
        try:
            content = sys.stdin.buffer.read() if name == "-" else Path(name[1:]).read_bytes()
        except OSError as error:
            raise UserError(f"{name}: the list {name[1:]} cannot be read: {error.strerror}.") from None
        lines = [os.fsdecode(line.rstrip(b"\r")) for line in content.removeprefix(BOM_UTF8).split(b"\n")]
        found = [Path(line) for line in lines if line.strip()]
        if not found:
            raise UserError(f"{name} names no image: a list has a path in each line.")
        paths += found
    return paths


def files_of(
    named: Sequence[Path], classes: Sequence[str]
) -> tuple[dict[Path, str | None], dict[str, str], dict[str, str]]:
    """The images, each once, in the order of `named`, with the one of `classes` that a folder around it names, if any;
    images that cannot be predicted, with the reason; and other files in the folders, with the reason.
    """
    from ..data.tree import NO_FAULT, list_images  # imports Pillow

    files: dict[Path, str | None] = {}
    refused: dict[str, str] = {}
    left_out: dict[str, str] = {}
    known = {same_letters(name): name for name in classes}
    for path in named:
        if path.is_dir():
            listing = list_images(path)
            for image in listing.images:
                around = map(same_letters, PurePosixPath(image).parent.parts)
                files[path / image] = next((known[folder] for folder in around if folder in known), None)
            for name, why in listing.left_out.items():
                (left_out if why in NO_FAULT else refused)[spelled_out(str(path / name))] = why
            if not listing.images:
                refused[spelled_out(str(path))] = "a folder without an image"
        elif path.exists():
            files.setdefault(path, None)
        else:
            refused[spelled_out(str(path))] = "there is no such file or folder"
    return files, refused, left_out


def same_letters(name: str) -> str:
    """A name in one Unicode form, as file systems store it in several, and as records spell it."""
    return unicodedata.normalize("NFC", spelled_out(name))


# --- Output ---------------------------------------------------------------------------------------------------------


def as_table(found: Found, terminal: bool, exact: bool) -> str:
    if not found.images:
        return ""
    rows = [
        entries(
            "" if rank else image["image"],
            found_class["class"],
            Entry(f"{100 * found_class['probability']:.1f} %", found_class["probability"]),
        )
        for image in found.images
        for rank, found_class in enumerate(image["classes"])
    ]
    return on_screen([Table("", ["image", "class", "probability"], rows, 1)], terminal)


def as_csv(found: Found, terminal: bool, exact: bool) -> str:
    """One line for each image and class."""
    text = io.StringIO()
    # Quotation marks keep a text one cell where a spreadsheet expects semicolons between cells.
    out = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    out.writerow(["image", "rank", "index", "class", "probability"])
    for image in found.images:
        for rank, found_class in enumerate(image["classes"], 1):
            name, label = image["image"], found_class["class"]
            if not exact:
                name, label = name if no_formula(name) == name else f"./{name}", no_formula(label)
            out.writerow([name, rank, found_class["index"], label, found_class["probability"]])
    return text.getvalue()


def as_json(found: Found, terminal: bool, exact: bool) -> str:
    refused = [{"image": image, "reason": why} for image, why in found.refused.items()]
    made: dict[str, Any] = {"run_id": found.run_id, "images": found.images, "refused": refused}
    made |= {"left_out": [{"file": name, "reason": why} for name, why in found.left_out.items()]}
    made |= {"labelled": found.labelled} if found.labelled else {}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


FORMATS = {"table": as_table, "csv": as_csv, "json": as_json}


if __name__ == "__main__":
    sys.exit(main())
