"""A comparison -> the tables of a report: accuracies, differences to a baseline, mean ranks, costs, published."""

from collections.abc import Callable
from statistics import fmean

from ..common.console import QUIET, Display, Warn
from ..common.tables import MISSING, Entry, Table, entries, number, table_of, time_entry
from ..records import arrays
from ..records.arrays import Predictions
from ..records.reading import Damaged, Record, is_number, stages
from .comparison import Cell, Comparison, distinct_runs, grouped, mean_of_all, waited
from .published import PROTOCOLS, against, what_is_known
from .record_views import Replicate, facts, show, validates
from .statistics import (
    ENOUGH_ROWS,
    MOST_SEEDS,
    Contest,
    by_image,
    contests,
    equivalence,
    mcnemar,
    ranks,
    signed,
    winner,
)

PredictionsOf = dict[Replicate, Predictions]

MOST_IMAGES = 5_000_000  # of --per-image, counted for each run of each difference: about a minute

WAITED = "Processor time: of the training thread, which waited while other programs ran"
BOLD = "Bold: ahead of all methods beside it, each time by a 95 % t interval of the paired difference"
UNSETTLED = "No method is ahead of all others of its row by a 95 % t interval of the paired difference"
NOT_JUDGED = "Several settings, none of which is picked by test accuracy, so without bold, differences and ranks"


def accuracies(comparison: Comparison) -> Table:
    """The main table: a row for each data set, backbone and setting, a column for each method."""
    # Validation data serve to choose: the best value there proves nothing.
    decided = contests(comparison) if not validates(comparison.metric) else []
    best = {id(contest.cells[method]) for contest in decided if (method := winner(contest))}

    def entry(cell: Cell | None) -> Entry:
        return Entry(MISSING) if cell is None else Entry(str(cell), cell.mean, bold=id(cell) in best)

    rows = [
        entries(row.dataset, row.backbone, row.settings, *(entry(row.cells.get(m)) for m in comparison.methods))
        for row in comparison.rows
    ]
    header = ["dataset", "backbone", "settings", *map(comparison.display, comparison.methods)]
    said = [BOLD if best else UNSETTLED] if any(map(comparable, decided)) else []
    several = [
        f"{comparison.display(method)} on {contest.dataset}, {contest.backbone}"
        for contest in decided
        for method in contest.several
    ]
    said += [f"{NOT_JUDGED}: {'; '.join(dict.fromkeys(several))}"] if several and len(comparison.methods) > 1 else []
    notes = said + comparison.notes
    return Table(comparison.title, header, rows, 3, comparison.chosen, notes).without_empty()


def verification(comparison: Comparison) -> Table:
    """The numbers of verification runs beside their pair accuracy, each a mean over seeds."""
    rows = [
        placed(row.dataset, row.backbone, row.settings, comparison.display(method))
        | {
            "std over folds": number(mean_of_all(cell.runs, "test_pair_accuracy_std"), ".1f"),
            "AUC": number(mean_of_all(cell.runs, "test_auc"), ".4f"),
            "TAR (%) at FAR 0.01": number(mean_of_all(cell.runs, "test_tar_at_far_0.01"), ".1f"),
            "TAR (%) at FAR 0.001": number(mean_of_all(cell.runs, "test_tar_at_far_0.001"), ".1f"),
        }
        for method, row, cell in comparison.results
    ]
    notes = [
        "Each fold of pairs is measured with the threshold that is best on all other folds; ROC over all pairs. "
        "TAR, FAR: true and false accept rates"
    ]
    return table_of("Verification of test pairs; mean over seeds", rows, 4, notes=notes)


def placed(dataset: str, backbone: str, settings: str, method: str) -> dict[str, str | Entry]:
    """The first columns of a row for one method."""
    return {"dataset": dataset, "backbone": backbone, "settings": settings, "method": method}


def costs(comparison: Comparison) -> Table | None:
    """Iterations of all stages and time of a run for each method; None if no record has a time.

    Processor times are added if a run waited for the processor: other programs ran, and times of two methods cannot be
    compared.
    """

    def length(run: Record) -> tuple[int | None, int]:
        iterations = facts(run)["iterations"]
        return iterations if isinstance(iterations, int) and iterations > 0 else None, stages(run)

    rows: list[dict[str, str | Entry]] = []
    some_waited = False
    for method in comparison.methods:
        cells = [row.cells[method] for row in comparison.rows if method in row.cells]
        runs_of_all = distinct_runs(run for cell in cells for run in cell.runs)
        timed = [run for run in runs_of_all if is_number(run.get("train_seconds"))]
        for (iterations, in_stages), alike in grouped(timed, length):
            seconds = fmean(run["train_seconds"] for run in alike)
            some_waited |= waited(alike)
            rows.append(
                {
                    "method": comparison.display(method),
                    "iterations": number(iterations, ",", f" in {in_stages} stages" * (in_stages > 1)),
                    "training time": time_entry(seconds),
                    "processor time": time_entry(mean_of_all(alike, "train_processor_seconds")),
                    "per iteration": number(iterations and 1000 * seconds / iterations, ".0f", " ms"),
                    "runs": number(len(alike)),
                }
            )
    rows = rows if some_waited else [row | {"processor time": ""} for row in rows]
    return table_of("Cost of a run, mean over runs", rows, 1, notes=[WAITED] * some_waited) if rows else None


def comparable(contest: Contest) -> bool:
    """True if two of its methods have two seeds in common, so that there is an interval between them."""
    cells = list(contest.cells.values())
    return not contest.several and any(
        len(one.values.keys() & other.values.keys()) > 1 for i, one in enumerate(cells) for other in cells[:i]
    )


def differences(comparison: Comparison, baseline: str) -> Table | None:
    """Each method minus the baseline, paired by seed or fold; None if there is no pair."""

    def row(contest: Contest) -> dict[str, Entry]:
        return {method: Entry(str(one), one.mean) for method, one in contest.differences(baseline).items()}

    how = f"{comparison.kind.of_differences}, paired by {comparison.paired_by}"
    title = f"Difference to {comparison.display(baseline)} {how}: mean [95 % t interval] (n)"
    found = [one for contest in contests(comparison) for one in contest.differences(baseline).values()]
    return by_contest(comparison, baseline, title, row, list({one.advice for one in found if one.advice}))


def by_contest(
    comparison: Comparison, baseline: str, title: str, row: Callable[[Contest], dict[str, Entry]], notes: list[str]
) -> Table | None:
    """A `row` for each contest, with a column for each method except the baseline; None without any entry."""
    others = [method for method in comparison.methods if method != baseline]
    rows = []
    for contest in contests(comparison):
        if found := row(contest):
            cells = [found.get(method, MISSING) for method in others]
            rows.append(entries(contest.dataset, contest.backbone, show(contest.shared), *cells))
    if not rows:
        return None
    header = ["dataset", "backbone", "settings", *map(comparison.display, others)]
    return Table(title, header, rows, 3, notes=notes).without_empty()


def by_image_table(comparison: Comparison, baseline: str, warn: Warn) -> Table | None:
    """Each method minus the baseline, over the same test images; None without stored predictions.

    Differences beyond MOST_IMAGES, counted in the order of the table, are left out, and the table says so.
    """
    display = Display("differences over test images", len(comparison.results), "result", quiet_seconds=QUIET)
    done, left_out, images = 0, 0, 0.0

    def row(contest: Contest) -> dict[str, Entry]:
        nonlocal done, images, left_out
        others = {method: cell for method, cell in contest.cells.items() if method != baseline}
        if not others or baseline not in contest.cells:
            return {}
        theirs: PredictionsOf | None = None
        found = {}
        for method, cell in others.items():
            images += sum(n for run in cell.runs + contest.cells[baseline].runs if is_number(n := run.get("n_test")))
            if images > MOST_IMAGES:
                left_out += 1
                continue
            display.update(done)
            done += 1
            theirs = predictions_of(contest.cells[baseline], warn) if theirs is None else theirs
            ours = predictions_of(cell, warn)
            pairs = [(ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys())]
            try:
                if pairs:
                    difference = by_image(pairs)
                    p = f", p={mcnemar(*pairs[0])[2]:.2g}" if len(pairs) == 1 else ""
                    found[method] = Entry(f"{difference}{p}", difference.mean)
            except ValueError as error:
                place = f"{contest.dataset}, {contest.backbone}"
                warn(f"no per-image test of {comparison.display(method)} on {place}: {error}")
        return found

    name = comparison.display(baseline)
    title = f"Difference to {name} in points, paired by test image: mean [95 % bootstrap interval] (n images)"
    notes = [
        "An image counts with its mean over seeds. The interval says what other test images might have given, not what "
        "other seeds might; with a single seed, p is McNemar's exact test"
    ]
    made = by_contest(comparison, baseline, title, row, notes)
    if left_out:
        cut = f"{left_out} differences beyond the first {MOST_IMAGES:,} images, counted for each run, are left out"
        warn(f"{cut}: name the folders of fewer runs")
        notes.append(cut)
    elif made is None:
        warn(f"no per-image test: no stored predictions of {name} and another method with the same seed")
    return made


def equivalences(comparison: Comparison, baseline: str, margin: float) -> Table | None:
    """Whether each method is no worse than the baseline by more than `margin` points; None without two shared seeds."""
    name = comparison.display(baseline)
    points = f"{margin:g} point{'s' * (margin != 1)}" if comparison.kind.percent else f"{margin:g}"
    words = {
        "equal": f"equal within {points}",
        "no worse": f"no worse by more than {points}",
        "worse": f"worse by more than {points}",
        "open": "open",
    }
    rows = []
    for contest in contests(comparison):
        for method, difference in contest.differences(baseline).items():
            found = equivalence(contest.cells[method], contest.cells[baseline], margin)
            if found is None:
                continue
            seeds = "" if found.found != "open" else f"about {found.seeds}" if found.seeds else f"over {MOST_SEEDS}"
            place = comparison.dataset_title(contest.dataset), contest.backbone, show(contest.shared)
            rows.append(
                placed(*place, comparison.display(method))
                | {
                    f"difference to {name}": Entry(difference.without_n, difference.mean),
                    "found": words[found.found],
                    "p": number(found.p_no_worse, ".2g"),
                    "seeds to settle it": Entry(seeds, found.seeds or MOST_SEEDS + 1) if seeds else MISSING,
                }
            )
    notes = [
        f"One-sided t tests at 5 % of the differences paired by {comparison.paired_by}; equal: two of them (TOST). p: "
        f"of being worse by {points} or more",
        "Seeds to settle it: with 80 % power, if the difference and its spread are those that were observed, of which "
        "few seeds know little",
    ]
    return table_of(f"No worse than {name} by more than {points}?", rows, 4, notes=notes) if rows else None


def predictions_of(cell: Cell, warn: Warn) -> PredictionsOf:
    """The predictions of the runs of a cell that have them; a damaged file is named through `warn`."""
    found: PredictionsOf = {}
    for key, run in zip(cell.values, cell.runs, strict=True):
        try:
            if (made := arrays.predictions(run)) is not None:
                found[key] = made
        except Damaged as error:
            warn(str(error))
    return found


def mean_ranks(comparison: Comparison) -> Table | None:
    """Mean rank over the data sets and backbones that have every method; None with fewer than two of them.

    A data set and backbone with several settings does not count as several data sets: a note says that it is left out.
    """
    methods, complete, left_out = comparison.methods, [], []
    for place, found in grouped(contests(comparison), lambda contest: f"{contest.dataset} with {contest.backbone}"):
        if len(found) > 1:
            left_out.append(place)
        elif found[0].cells.keys() == set(methods):
            complete.append(found[0].cells)
    made = ranks([{method: cells[method].merit for method in methods} for cells in complete])
    if made is None:
        return None
    if made.critical_difference is None:
        said = f"Too few rows for a critical difference ({made.rows}; at least {ENOUGH_ROWS}, and three methods)"
    else:
        said = (
            f"Friedman p={made.friedman_p:.2g}; two methods differ if their mean ranks are more than "
            f"{made.critical_difference:.2f} apart (Nemenyi, 95 %, rows taken as independent)"
        )
    title = f"Mean rank over the {made.rows} rows of a data set and backbone that have every method (1 is best)"
    rows: list[dict[str, str | Entry]] = [
        {"method": comparison.display(method), "mean rank": number(mean, ".2f")}
        for method, mean in sorted(made.mean.items(), key=lambda item: item[1])
    ]
    notes = [f"Left out, with several settings outside reg: {', '.join(left_out)}"] if left_out else []
    return table_of(title, rows, 1, remarks=[said], notes=notes)


def beside_published(comparison: Comparison, protocol: str) -> Table:
    """Each cell of ours beside the published number, with the settings in which they differ."""
    rows, matches = [], against(comparison, protocol)
    for match in matches:
        number, difference, row = match.number, match.difference, match.row
        rows.append(
            placed(row.dataset, row.backbone, row.settings, comparison.display(match.method))
            | {
                "ours": Entry(str(match.cell), match.cell.mean),
                "published": Entry(str(number), number.mean) if number else MISSING,
                "difference": Entry(signed(difference), difference) if difference is not None else MISSING,
                "differs: ours (published)": ", ".join(match.differing) or ("nothing known" if number else MISSING),
            }
        )
    known = PROTOCOLS[protocol]
    sources = sorted({match.number.source for match in matches if match.number})
    notes = [f"Published: {'; '.join(sources)}"] if sources else []
    notes += [f"How those were made: {known.remark}"] if known.remark and sources else []
    title = f"Beside published numbers: {known.title}"
    return table_of(title, rows, 4, remarks=what_is_known(comparison, protocol), notes=notes)
