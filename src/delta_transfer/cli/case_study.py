"""delta-report case-study: what fine-tuned networks look at, image by image, and what becomes of unused channels.

    delta-report case-study RUN_A RUN_B                    # pictures of images on which A and B disagree
    delta-report case-study RUN_A RUN_B --images 17,230    # or of these, by their index in the data set

Pictures of test images on which two runs disagree, with activation maps and Grad-CAM of each run and of the source
network; and which of the source's unused channels fine-tuning brings to life. Runs with a source= or from random
weights get saliency maps, too.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

from ..common.console import command_parser, log, show_messages, stoppable
from ..common.tables import as_markdown, on_screen
from ..inspect.case_study import attention_pictures, check_comparable, labels_of, pictures
from ..inspect.finished import run_folder
from ..inspect.image_maps import grad_cam_package
from ..inspect.replay import Replay, replay
from ..inspect.unused_channels import caption, changes_of, figure_of, table_of
from ..records.files import make_output_folder, write_figure
from .predict import positive


@stoppable
def main(argv: list[str]) -> int:
    show_messages(information_on_stderr=True)
    report(parser().parse_args(argv))
    return 0


def parser() -> argparse.ArgumentParser:
    p = command_parser("delta-report case-study", __doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its id below results/runs; first A, B")
    p.add_argument("--images", type=indices, metavar="INDEX,...", help="show these test images, by data set index")
    p.add_argument("--count", type=positive, default=3, metavar="N", help="images of each kind (default: 3)")
    p.add_argument(
        "--silent",
        type=fraction,
        default=0.1,
        metavar="F",
        help="a channel below this fraction of its tap's median channel is silent (default: 0.1)",
    )
    p.add_argument(
        "--count-images",
        type=positive,
        default=512,
        metavar="N",
        help="test images over which channels are averaged (default: 512)",
    )
    p.add_argument("--output", type=Path, default=Path("results/case-study"), metavar="DIR")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="the data set's folder (default: as recorded)")
    p.add_argument("--weights", type=Path, metavar="FILE", help="the file of source weights (default: as recorded)")
    return p


def indices(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def fraction(text: str) -> float:
    if not 0 < float(text) < 1:
        raise ValueError(text)
    return float(text)


def report(args: argparse.Namespace) -> None:
    """Writes all files of the command. Raises UserError."""
    wants_pictures = args.images is not None or len(args.runs) > 1
    if wants_pictures:
        grad_cam_package()  # a missing package is an error before anything is computed
    else:
        log.info("one run, and no --images: no pictures of disagreements")
    runs = [replay(run_folder(name), data_dir=args.data_dir, weights=args.weights) for name in args.runs]
    check_comparable(runs)
    labels = labels_of(runs)
    for run in runs:
        _ = run.target  # a missing network too
    make_output_folder(args.output)
    if wants_pictures:
        for stem, figure, text in pictures(runs, labels, args.images, args.count):
            write(figure, args.output / stem, text)
    for run, label in zip(runs, labels, strict=True):
        for stem, figure, text in attention_pictures(run, label, args.images, args.count):
            write(figure, args.output / stem, text)
    if runs[0].config.backbone.weights == "none":
        log.info("no table of unused channels: these networks began with random weights, not from a source network")
    else:
        channels(runs, labels, args)


def channels(runs: list[Replay], labels: list[str], args: argparse.Namespace) -> None:
    """Writes the table of unused channels, to a file and the screen, and a figure."""
    changes, images = changes_of(runs, labels, args.count_images)
    table = table_of(changes, args.silent, images)
    stem = args.output / "unused_channels"
    write(figure_of(changes, args.silent), stem, caption(changes, args.silent, images))
    stem.with_suffix(".md").write_text(as_markdown([table]), encoding="utf-8")
    print(f"{stem}.md\n")
    sys.stdout.write(on_screen([table], sys.stdout.isatty()))


def write(figure: Figure, path: Path, text: str) -> None:
    """Writes <path>.png, .pdf and the caption .txt."""
    write_figure(figure, path, bbox_inches="tight")
    Path(f"{path}.txt").write_text(text + "\n", encoding="utf-8")
    print(f"{path}.png, .pdf, .txt")
