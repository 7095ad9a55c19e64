"""Further measurements of runs (`evaluate.*`): other test sets, and what the network kept of its source."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from ..records.reading import Record, is_number, section
from .comparison import Cell

KEPT = {  # title and meaning
    "kept_agreement": ("source's answers", "test images for which the source's head says the same as before training"),
    "kept_source_top1": ("source's classes", "accuracy of the source's head"),
    "kept_probe_top1": ("probe", "accuracy of a linear probe of the embeddings"),
}


@dataclass(frozen=True)
class Measure:
    """A number of a record, in percent."""

    key: str
    title: str
    images: str  # a fingerprint, so that measurements on other images are another measure

    def of(self, cell: Cell, suffix: str = "") -> Cell:
        """The runs of a cell that measured it, with the values. suffix: "_before" for those of the source network."""
        found = [
            (replicate, run)
            for replicate, run in zip(cell.values, cell.runs, strict=True)
            if self in measures_of(run) and is_number(run.get(self.key + suffix))
        ]
        return Cell({replicate: float(run[self.key + suffix]) for replicate, run in found}, [run for _, run in found])


def measures_of(record: Record) -> list[Measure]:
    also, sets = section(record, "evaluate").get("also"), record.get("further_sets")
    also, sets = (found if isinstance(found, dict) else {} for found in (also, sets))
    probe = next((name for name in sets if name not in also), "")
    found = [Measure(f"also_{name}_top1", name, str(sets.get(name))) for name in also]
    found.append(Measure("kept_agreement", KEPT["kept_agreement"][0], str(record.get("dataset_fingerprint"))))
    for key in ("kept_source_top1", "kept_probe_top1"):
        found.append(Measure(key, f"{KEPT[key][0]}, {probe}", str(sets.get(probe))))
    return [one for one in found if is_number(record.get(one.key))]


def measures_in(cells: Iterable[Cell], by: str = "title") -> dict[str, Measure]:
    """The measures of all runs of the cells, by title or key. Equal names get the beginning of a fingerprint."""
    found = list(dict.fromkeys(one for cell in cells for run in cell.runs for one in measures_of(run)))
    names = [getattr(one, by) for one in found]
    return {
        name if names.count(name) == 1 else f"{name} ({one.images[:8]})": one
        for one in sorted(found, key=lambda one: (one.key in KEPT, one.key, one.images))
        for name in [getattr(one, by)]
    }


def meanings(measures: dict[str, Measure], cells: list[Cell]) -> list[str]:
    """The small print about what is kept of the source, with the values before training."""
    found = []
    for title, one in measures.items():
        values = [value for cell in cells for value in one.of(cell, "_before").values.values()]
        if one.key in KEPT:
            found.append(f"{title}: {KEPT[one.key][1]}" + (f", {fmean(values):.1f} % before" if values else ""))
    return found
