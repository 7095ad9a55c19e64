"""The options of delta-report, and which of them contradict each other."""

import argparse
from pathlib import Path

from ..common.console import command_parser
from ..records.metrics import METRICS, OF_OTHER_TASKS
from ..reporting.published import PROTOCOLS
from ..reporting.record_views import validates
from ..reporting.rivals import RULES

NUMBERS = ("csv", "json")  # formats for other programs
FORMATS = ("table", "markdown", "latex", *NUMBERS, "html")
BALANCED = "test_balanced_accuracy"
PAIRS = "test_pair_accuracy"  # the metric of verification runs, which have one more table

MORE = """\
files:
  RUN/summary.json   a finished run of delta-run; beside it metrics.jsonl, for
                     learning curves, and predictions.npz, for --per-image
  DIR/records.jsonl  many runs, written by delta-report publish; beside it
                     predictions.npz

exit status:
  0  a table was made
  1  there is nothing to compare, or a folder or file cannot be read or written:
     a message says which
  2  an unknown option, or options that contradict each other

to choose settings by cross-validation, and make the final runs with the choice:
  delta-run -m reg=delta reg.alpha=0.001,0.01,0.1 split.folds=3 \\
      split.fold='range(3)'
  delta-report --select cv --emit-overrides --with-paths | sh
"""


def arguments(argv: list[str] | None, description: str) -> argparse.Namespace:
    p = parser(description)
    args = p.parse_args(argv)
    if args.select and args.metric and not validates(args.metric):
        p.error("--select chooses on validation data and never on test data: leave out --metric")
    args.metric = args.metric or ("val_top1" if args.select else "test_top1")
    if args.emit_overrides and not args.select:
        p.error("--emit-overrides needs --select cv or --select val")
    if args.seeds < 1:
        p.error("--seeds must be at least 1")
    if args.format == "html" and not args.output:
        p.error("--format html needs --output FILE")
    if validates(args.metric) and (args.against or args.baseline or args.per_image):
        p.error("--against, --baseline and --per-image are about test accuracies: leave out --metric and --select")
    if (args.per_image and args.metric in (*OF_OTHER_TASKS, BALANCED)) or (
        args.against and args.metric in (PAIRS, BALANCED)
    ):
        p.error("--per-image and --against are about top-1 accuracies: leave out --metric")
    if args.per_image and args.format in NUMBERS:
        p.error("--per-image makes a table of words: not with --format csv or json")
    if args.margin is not None and not 0 < args.margin <= 100:
        p.error("--margin must be a number of points above 0")
    if args.margin is not None and (validates(args.metric) or args.format in NUMBERS):
        p.error("--margin makes a table of words about test accuracies: not on validation data, nor as csv or json")
    if (args.no_caption or args.style != "screen") and not args.figures:
        p.error("--style and --no-caption are about --figures DIR")
    if args.watch is not None and (args.watch <= 0 or args.emit_overrides):
        p.error("--watch must be a number of seconds above 0, and does not go with --emit-overrides")
    if (args.pictures or args.images) and args.format != "html":
        p.error("--pictures and --images go into the page of --format html")
    if args.images and not args.images.is_dir():
        p.error(f"--images {args.images}: no such folder")
    return args


def parser(description: str) -> argparse.ArgumentParser:
    p = command_parser("delta-report", description, MORE)
    p.add_argument(
        "dirs",
        nargs="*",
        type=Path,
        metavar="DIR",
        default=[Path("results")],
        help="a results_dir, its runs folder, any folder of run folders, or a published one (default: results)",
    )
    p.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="table: for the terminal (default); markdown, latex: to paste; csv, json: for programs; html: one page",
    )
    p.add_argument(
        "--layout",
        choices=["leaderboard", "matrix"],
        default="leaderboard",
        help="leaderboard: a row for each method, the best mean first (default); matrix: as in papers, a row for each "
        "data set and a column for each method",
    )
    p.add_argument(
        "--metric",
        choices=list(METRICS),
        metavar="METRIC",
        help=f"{', '.join(METRICS)} (default: test_top1, and runs of other tasks in tables of their own)",
    )
    p.add_argument(
        "--against",
        choices=list(PROTOCOLS),
        metavar="PROTOCOL",
        help="also the published numbers of the DELTA paper (paper), AFA, L2T-ww, Transfer-Learning-Library (parts of "
        f"the training images; ten data sets; MoCo weights) or PaddleTransfer: {', '.join(PROTOCOLS)}",
    )
    p.add_argument(
        "--baseline",
        metavar="METHOD",
        help="the method that others are compared with (default: l2, or scratch if targets begin at random)",
    )
    p.add_argument(
        "--per-image", action="store_true", help="also differences over the same test images, with bootstrap intervals"
    )
    p.add_argument(
        "--margin",
        type=float,
        nargs="?",
        const=1.0,
        metavar="POINTS",
        help="also which methods are no worse than the baseline by more than POINTS of accuracy (default: 1), and how "
        "many seeds would settle it",
    )
    p.add_argument(
        "--transfer",
        action="store_true",
        help="only runs whose target begins with random weights or has a source= of its own (L2T-ww, LwF, Scratch "
        "...); by default they have tables of their own beside those of fine-tuning",
    )
    p.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="also write figures there, PNG and PDF; the first: differences to the baseline",
    )
    p.add_argument(
        "--style",
        choices=["screen", "paper"],
        default="screen",
        help="look of the figures; paper: serif letters, and every figure as wide as a column",
    )
    p.add_argument(
        "--no-caption", action="store_true", help="figures without title and caption, for a paper that has its own"
    )
    p.add_argument("--pictures", type=Path, metavar="DIR", help="for --format html: show the PNGs of a case study")
    p.add_argument(
        "--images", type=Path, metavar="DIR", help="for --format html: the data set, to show its worst images"
    )
    p.add_argument(
        "--select",
        choices=["cv", "val"],
        help="name the reg settings with the best validation accuracy for each method, data set and backbone: "
        "mean over the folds of split.folds (cv), or on the images held out by split.val_fraction (val)",
    )
    p.add_argument(
        "--prefer",
        choices=RULES,
        default=RULES[0],
        help="with --select, between methods: the simplest within one standard error of the best, or the best "
        "(default: simple)",
    )
    p.add_argument(
        "--emit-overrides",
        action="store_true",
        help="with --select: only the delta-run commands of the chosen settings to stdout, the table to stderr",
    )
    p.add_argument(
        "--with-paths",
        action="store_true",
        help="with --emit-overrides: name files and folders as the records do, for records of your own",
    )
    p.add_argument("--seeds", type=int, default=5, metavar="N", help="how many seeds those commands run (default: 5)")
    p.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to stdout")
    p.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="renew the report whenever a run has ended, until Ctrl-C; looks every SECONDS (default: 10), and an open "
        "page reloads itself",
    )
    return p
