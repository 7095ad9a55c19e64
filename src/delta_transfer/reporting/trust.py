"""delta-report trust: shows from its predictions how far a model can be trusted.

    delta-report trust results/runs/photos-resnet18-delta-s0-0123abcd
    delta-report trust results                      # all runs in one table
    delta-report trust RUN OTHER_RUN                # also which images only one of them gets right
    delta-report trust RUN --format markdown --output trust.md

For each run with predictions.npz it shows accuracy by class, the largest confusions, calibration, accuracy of the
surest images, and the worst images. All fits, such as that of a temperature, use predictions for held-out training
images (validation.npz of the run, or of runs on folds with its settings) and never test images. The held-out images
also show which training images may have a wrong label.
"""

import sys
from pathlib import Path

import numpy as np

from ..common import tables
from ..common.console import QUIET, Display, Warn, command_parser, log, spelled_out
from ..common.errors import UserError
from ..records.arrays import VALIDATION, Predictions, pooled, predictions
from ..records.files import write_output
from ..records.reading import Damaged, Record, method_of, read_all, run_id
from ..records.run_directory import class_names
from .comparison import grouped, grouped_by_varying
from .record_views import contradiction, dataset_and_backbone, problem, reg_settings, settings, within
from .trust_tables import HeldOut, Trusted, as_json, images_of, trust_tables

# ---- reading ---------------------------------------------------------------------------------------------


def questions(records: list[Record]) -> dict[int, int]:
    """By id(record), a number that is the same for runs on folds and final runs of one method and setting."""

    def view(record: Record) -> dict[str, object]:
        shared = {k: v for k, v in settings(record, "val_top1").items() if not within(k, ["split"])}
        return shared | reg_settings(record)

    alike: list[list[Record]] = []
    for _, same in grouped(records, lambda record: (dataset_and_backbone(record), method_of(record))):
        alike += [runs for _, runs in grouped_by_varying(same, view)]
    return {id(record): number for number, runs in enumerate(alike) for record in runs}


def trusted(records: list[Record], warn: Warn = log.info) -> list[Trusted]:
    """The runs with predictions of classes. warn: called with a line about each run that is left out."""
    tested: list[tuple[Record, Predictions]] = []
    validated: list[tuple[Record, Predictions]] = []
    without = 0
    display = Display("looking at predictions", len(records), "run", quiet_seconds=QUIET)
    for number, record in enumerate(records):
        display.update(number)
        reasons = [problem(record, metric) for metric in ("test_top1", "val_top1")]
        if None not in reasons and reasons[0] != "no test_top1":
            warn(f"skipped {run_id(record)}: {reasons[0]}")
            continue
        try:
            found = predictions(record)
            if said := contradiction(record, found):
                warn(f"skipped {run_id(record)}: {said}")
                continue
            found = found if reasons[0] is None else None
            own = predictions(record, VALIDATION) if reasons[1] is None else None
        except Damaged as error:
            warn(str(error))
            continue
        if found:
            tested.append((record, found))
        if own:
            validated.append((record, own))
        without += not (found or own)
    if without:
        warn(f"left out: {without} runs without predictions of classes")
    asked = questions([record for record, _ in tested + validated])
    by_question = dict(grouped(validated, lambda pair: asked[id(pair[0])]))
    of_folds = {number: pool(parts) for number, parts in by_question.items()}
    made = []
    for record, found in tested:
        itself = [(r, p) for r, p in validated if r is record]
        held_out = pool(itself) if itself else of_folds.get(asked[id(record)])
        made.append(Trusted(record, found, classes_of(record, found), held_out, True))
    answered = {asked[id(record)] for record, _ in tested}
    for number, held_out in of_folds.items():
        if number not in answered:
            record = by_question[number][0][0]
            found = Predictions(held_out.labels, held_out.logits, np.array(list(held_out.images)))
            made.append(Trusted(record, found, classes_of(record, found), held_out, False))
    return made


def pool(parts: list[tuple[Record, Predictions]]) -> HeldOut:
    names: dict[int, str] = {}
    for record, found in parts:
        names |= dict(zip(found.index.tolist(), images_of(record, found, VALIDATION), strict=True))
    made = pooled([found for _, found in parts])
    return HeldOut({i: names[i] for i in made.index.tolist()}, made.labels, made.logits)


def classes_of(record: Record, found: Predictions) -> list[str]:
    try:
        return list(class_names(record))
    except UserError as error:
        log.info(f"classes by number: {error}")
        return [f"class {i}" for i in range(found.logits.shape[1])]


# ---- command ---------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    p = command_parser("delta-report trust", __doc__)
    p.add_argument("dirs", nargs="+", type=Path, metavar="RUN", help="run folders, a results_dir or a published folder")
    p.add_argument("--format", choices=["table", "markdown", "json"], default="table", help="default: for the terminal")
    p.add_argument("--most", type=int, default=10, metavar="N", help="lines of a table (default: 10)")
    p.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to stdout")
    args = p.parse_args(argv)
    if args.most < 1:
        p.error("--most must be at least 1")
    for absent in [top for top in args.dirs if not top.is_dir()]:
        log.info(f"no such folder: {absent}")
    found = trusted(read_all(args.dirs)[0])
    if not found:
        raise UserError(f"No finished run with predictions in {', '.join(spelled_out(str(d)) for d in args.dirs)}.")
    if args.format == "json":
        text = as_json(found)
    elif args.format == "markdown":
        text = tables.as_markdown(trust_tables(found, args.most))
    else:
        text = tables.on_screen(trust_tables(found, args.most), terminal=not args.output and sys.stdout.isatty())
    if args.output:
        write_output(args.output, text)
    else:
        sys.stdout.write(text)
    return 0 if all(top.is_dir() for top in args.dirs) else 1
