"""A comparison -> leaderboards: a row for each method and setting, best mean first, and a sentence that sums it up."""

import math
from statistics import fmean

from ..common.tables import MISSING, Entry, Table, bars, number, table_of, time_entry
from .comparison import Cell, Comparison, Result, mean_of_all, recorded, waited
from .further import Measure, meanings, measures_in
from .record_views import show, validates
from .sections import BOLD, WAITED
from .statistics import Contest, Difference, contests, paired, standing, winner

NAMED = 5  # most methods in a sentence
MANY = 10  # least number of methods of which one may well seem different by chance


def leaderboards(comparison: Comparison, baseline: str | None) -> list[Table]:
    """A table for each data set, backbone and setting outside reg; the last one has the notes of all.

    baseline: the method of the differences; None on validation data, which serve to choose and prove nothing.
    """
    made = [
        leaderboard(comparison, sorted(results, key=lambda one: -one.cell.merit), contest, baseline)
        for (_, results), contest in zip(comparison.places, contests(comparison), strict=True)
    ]
    made[-1].notes.extend(comparison.notes)
    made[-1].remarks.extend(comparison.chosen)
    return made


def leaderboard(comparison: Comparison, lines: list[Result], contest: Contest, baseline: str | None) -> Table:
    best = None if validates(comparison.metric) else winner(contest)
    base = contest.cells.get(baseline or "")
    cells = [one.cell for one in lines]
    found = [paired(cell, base) if base and cell is not base else None for cell in cells]
    drawn = iter(bars([one.span for one in found if one]) if any(found) else [])
    measures = {} if validates(comparison.metric) else measures_in(cells)  # no setting is chosen on further test sets

    def difference(cell: Cell, one: Difference | None) -> Entry:
        if one is None or not any(found):
            return Entry("" if not any(found) else "baseline" if cell is base else MISSING)
        fewer = f" ({one.n})" if one.n < cell.n else ""
        return Entry(one.without_n + fewer, one.mean)

    name, some_waited = comparison.display(baseline or ""), any(waited(cell.runs) for cell in cells)
    made: list[dict[str, str | Entry]] = [
        {
            "method": comparison.display(method),
            "settings": show(row.reg).replace("reg.", ""),
            "mean ± std": Entry(str(cell).rpartition(" (")[0], cell.mean, bold=method == best),
            f"difference to {name}": difference(cell, one),
            "": Entry("", bar=next(drawn)) if one else "",
            **{title: measured(measure, cell, base) for title, measure in measures.items()},
            "n": number(cell.n),
            "time of a run": time_entry(fmean(times) if (times := recorded(cell.runs, "train_seconds")) else None),
            "processor time": time_entry(mean_of_all(cell.runs, "train_processor_seconds")) if some_waited else "",
        }
        for (method, row, cell), one in zip(lines, found, strict=True)
    ]
    by = "validation mean" if validates(comparison.metric) else "mean"
    measured_in = f"{comparison.measured[:1].lower()}{comparison.measured[1:]}"
    title = f"{comparison.place_title(lines[0].row.place)}: {measured_in}, sorted by {by}"
    notes = [BOLD] if best else []
    notes += [f"± sample std over n {comparison.over}"] if any(cell.n > 1 for cell in cells) else []
    if any(found):
        notes.append(
            f"Difference: mean and 95 % t interval, {comparison.kind.of_differences}, paired by "
            f"{comparison.paired_by}; a bar, where there is room, shows it; 0 is {name}"
        )
        if comparison.paired_by == "fold":
            notes.append("Folds share training data, so that intervals tend to be too short")
    notes += [WAITED] * some_waited
    if measures:
        notes.append(f"{'; '.join(measures)}: mean in %" + (f", difference to {name} as before" if any(found) else ""))
        notes += meanings(measures, cells)
    table = table_of(title, made, 2, verdict=verdict(comparison, contest, baseline))
    if any(entry.text.endswith(")") for row in table.rows for entry in row[table.names + 1 :]):
        notes.append("(k) after a number: only k seeds have it, and what it is compared with")
    if sum(map(bool, found)) >= MANY:
        notes.append(
            "The intervals are not corrected for the number of methods: of 20 methods that are like "
            f"{name}, one is expected to seem different"
        )
    table.notes.extend(notes)
    return table


def measured(measure: Measure, cell: Cell, base: Cell | None) -> Entry:
    """The mean of a further measure and its paired difference to the baseline."""
    own = measure.of(cell)
    if not own.values:
        return Entry(MISSING)
    one = paired(own, measure.of(base)) if base and cell is not base else None
    fewest = min(own.n, one.n) if one else own.n
    words = [f"{own.mean:.{own.kind.digits}f}", *([one.without_n] if one else [])]
    return Entry(", ".join(words) + (f" ({fewest})" if fewest < cell.n else ""), own.mean)


# ---- one sentence ----------------------------------------------------------------------------------------


def verdict(comparison: Comparison, contest: Contest, baseline: str | None) -> str:
    """The result of the table in a sentence; empty if there is nothing to compare."""
    cells, display = contest.cells, comparison.display
    if validates(comparison.metric):
        return "Validation results serve to choose settings. Test results say how good a choice is."
    if contest.several:
        several = enumerated(list(map(display, contest.several)))
        return f"Several settings of {several} were run. Test results never choose among them: --select does."
    if len(cells) < 2:
        return ""
    found = standing(contest, baseline or "")
    name, pair = display(baseline or "the baseline"), comparison.paired_by
    top = [display(m) for m, cell in cells.items() if math.isclose(cell.mean, cells[found.best].mean)]
    highest = "lowest" if comparison.kind.less_is_better else "highest"
    highest = f"{enumerated(top)} {'share' if len(top) > 1 else 'has'} the {highest} mean"
    if baseline not in cells:
        return f"{highest}. There is no run of {name} to compare with."
    if not found.has_intervals:
        if any(one.n > 1 for one in found.differences.values()):
            return f"{highest}. Each {pair} gives the same differences to {name}, so that there is no interval."
        return f"{highest}. With one {pair} in common nothing can be told from chance."
    one, noise = found.differences.get(found.best), f"more than the noise of {pair}s"
    fewer = one and one.n < max(cells[found.best].n, cells[baseline].n)  # then the means may differ the other way
    its = beside(name, one, f" over the {one.n} {pair}s that both have" if fewer else "") if one else ""
    if found.wins:
        return f"{top[0]} is ahead of every other method by {noise}" + (f"; {its}." if one else ".")
    ahead, behind = list(map(display, found.ahead)), list(map(display, found.behind))
    words = [f"{are(ahead)} ahead of {name} by {noise}"] if ahead else []
    words += [f"{are(behind)} behind {'it' if ahead else f'{name} by {noise}'}"] if behind else []
    lead = f"; {its}{'' if one.excludes_zero else ', which may be chance'}." if one else "."
    advice = next((f" {one.advice}" for one in found.differences.values() if one.advice), "")
    found_so = "; ".join(words) or f"No method can be told from {name}"
    return f"{found_so}. {highest}{lead if len(top) == 1 else '.'}{advice}"


def beside(baseline: str, one: Difference, over: str) -> str:
    points = " points" * one.kind.percent
    return f"its difference to {baseline}{over} is {one.signed(one.mean)}{points} ({one.certainty})"


def enumerated(names: list[str]) -> str:
    names = [*names[:NAMED], f"{len(names) - NAMED} more"] if len(names) > NAMED + 1 else names
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def are(names: list[str]) -> str:
    return f"{enumerated(names)} {'are' if len(names) > 1 else 'is'}"
