"""delta-report attention: the channel weights of DELTA, and what the heaviest channels look at.

    delta-report attention results/runs/cub-resnet18-delta-s0-0123abcd
    delta-report attention RUN_ON_CUB RUN_ON_DOGS              # also how far two data sets agree on the channels
    delta-report attention RUN --patches --data-dir /data      # also the test patches that excite the heaviest channels

The tables go to stdout and to attention.md. Figures are PNG and PDF. Messages about what is missing go to stderr.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from ..common import tables
from ..common.console import command_parser, log, show_messages
from ..common.errors import UserError
from ..inspect.attention import (
    Attention,
    attention_of,
    distinct,
    histograms,
    names_of,
    overlap_table,
    weight_table,
)
from ..records.files import make_output_folder, write_figure
from ..records.reading import read, section
from .predict import positive


def main(argv: list[str]) -> int:
    show_messages(information_on_stderr=True)
    args = arguments(argv)
    attentions = distinct(attentions_of(args.runs))
    if not attentions:
        log.info("delta-report attention: none of these runs has channel weights. Make some with delta-run reg=delta")
        return 1
    report(attentions, args)
    return 0


def report(attentions: list[Attention], args: argparse.Namespace) -> None:
    made = [weight_table(attentions)]
    if table := overlap_table(attentions):
        made.append(table)
    sys.stdout.write(tables.on_screen(made, sys.stdout.isatty()))
    make_output_folder(args.output)
    (args.output / "attention.md").write_text(tables.as_markdown(made), encoding="utf-8")
    log.info(f"written: {args.output / 'attention.md'}")
    save(histograms(attentions), args.output / "histograms")
    if args.patches:
        for name, attention in zip(names_of(attentions), attentions, strict=True):
            for tap, figure in patches(attention, name, args):
                save(figure, args.output / re.sub(r"[^\w.-]+", "-", f"patches-{name}-{tap}"))


def attentions_of(runs: list[str]) -> list[Attention]:
    from ..inspect.finished import run_folder  # imports torch

    found = []
    for name in dict.fromkeys(runs):
        try:
            record = read(run_folder(name))
            attention = attention_of(record)
        except UserError as error:
            log.info(str(error))
            continue
        if record.get("unreadable"):
            log.info(f"{name}: summary.json is unreadable: {record['unreadable']}")
        elif attention is None:
            method = section(record, "reg").get("name")
            log.info(f"{name}: no attention.safetensors (reg={method}); runs of reg=delta have one")
        else:
            found.append(attention)
    return found


def patches(attention: Attention, name: str, args: argparse.Namespace) -> Iterator[tuple[str, Figure]]:
    """(tap, figure) for each tap; only a message if data or source weights of the run are missing."""
    from ..inspect.patches import patch_figures
    from ..inspect.replay import replay

    try:
        run = replay(attention.record["folder"], data_dir=args.data_dir, weights=args.weights)
        yield from patch_figures(attention, name, run, args.top)
    except UserError as error:
        log.info(f"no patches of {name}: {error}")


def save(figure: Figure, stem: Path) -> None:
    write_figure(figure, stem)
    log.info(f"written: {stem}.png, .pdf")


def arguments(argv: list[str]) -> argparse.Namespace:
    p = command_parser("delta-report attention", __doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run of reg=delta, or its id below results/runs")
    p.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("results/attention"),
        help="for attention.md and the figures (default: results/attention)",
    )
    p.add_argument(
        "--patches",
        action="store_true",
        help="also the test patches that excite the heaviest channels; needs the data and the source weights",
    )
    p.add_argument("--top", type=positive, metavar="N", default=8, help="how many channels of each layer (default: 8)")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="where the data are here (default: as recorded)")
    p.add_argument("--weights", type=Path, metavar="FILE", help="source weights here (default: as recorded)")
    return p.parse_args(argv)
