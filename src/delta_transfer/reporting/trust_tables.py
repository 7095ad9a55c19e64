"""How far a run can be trusted by its predictions, as numbers, tables and JSON."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..common.console import log
from ..common.tables import MISSING, Bar, Entry, Table, number, table_of
from ..records.arrays import Predictions, image_names
from ..records.reading import Record, method_title, run_id, seed
from .calibration import (
    BINS,
    KNOWN,
    Judged,
    accuracy_at,
    averages,
    calibration_error,
    confusion,
    none_of_these,
    reliability,
    softmax,
    suspects,
    temperature,
    top_k,
    wilson,
)
from .comparison import dataset_titles
from .record_views import dataset_and_backbone
from .statistics import mcnemar

MOST = 4  # most runs that are shown with their classes and images
Cells = dict[str, str | Entry]  # of a row, by column
COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)


@dataclass(frozen=True)
class HeldOut:
    """Predictions of networks that did not train on the images, from all runs with one set of settings."""

    images: dict[int, str]  # names, or numbers in the data set, by number in the data set
    labels: np.ndarray
    logits: np.ndarray  # mean over the runs that held an image out

    @cached_property
    def judged(self) -> Judged:
        return Judged(self.labels, softmax(self.logits))


def images_of(record: Record, found: Predictions, what: str = "predictions") -> list[str]:
    return image_names(record, what) or [f"image {i}" for i in found.index]


@dataclass(frozen=True)
class Trusted:
    """A run with its predictions; without a final run, all folds of one set of settings."""

    record: Record
    made: Predictions
    classes: list[str]
    held_out: HeldOut | None  # None: not recorded
    tested: bool  # False: `made` are the held-out predictions themselves

    @property
    def judged(self) -> Judged:
        """It is not kept, since probabilities are twice as large as logits and there may be thousands of runs."""
        return Judged(self.made.labels, softmax(self.made.logits))

    @cached_property
    def images(self) -> list[str]:
        """Names, by position in the arrays."""
        known = None if self.tested else self.held_out
        return list(known.images.values()) if known else images_of(self.record, self.made)

    @property
    def name(self) -> str:
        dataset, backbone = dataset_and_backbone(self.record)
        which = f"seed {seed(self.record)}" if self.tested else "folds"
        title = dataset_titles([self.record]).get(dataset, dataset)
        return f"{method_title(self.record)} on {title}, {backbone}, {which}"

    @cached_property
    def temperature(self) -> float | None:
        known = self.held_out if self.tested else None
        return temperature(known.labels, known.logits) if known else None

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """All single numbers, as fractions; None for numbers that need held-out predictions if there are none."""
        judged, t = self.judged, self.temperature
        scaled = None if t is None else Judged(judged.labels, softmax(self.made.logits, t))
        low, high = wilson(int(judged.right.sum()), len(judged.labels))
        least = none_of_these(self.held_out.judged) if self.held_out and self.tested else None
        return {
            "n": len(judged.labels),
            "accuracy": float(judged.right.mean()),
            "accuracy_interval": [low, high],
            **averages(confusion(judged)),
            "top5": top_k(judged, 5) if len(self.classes) > 5 else None,
            "confidence": float(judged.confidence.mean()),
            "calibration_error": calibration_error(judged),
            "temperature": t,
            "calibration_error_at_temperature": calibration_error(scaled) if scaled else None,
            "none_below": least,
            "none_of_these": None if least is None else float((judged.confidence < least).mean()),
        }


# ---- tables ----------------------------------------------------------------------------------------------


def percent(part: float | None) -> Entry:
    return Entry(MISSING) if part is None else Entry(f"{100 * part:.1f}", part)


def accuracy(right: int, n: int, zero: float) -> Cells:
    """An accuracy with its interval, as text and as a bar on 0..1. zero: the place of its mark."""
    if not n:
        return {"accuracy": MISSING, "": ""}
    low, high = wilson(right, n)
    text = f"{100 * right / n:.1f} [{100 * low:.0f}, {100 * high:.0f}]"
    return {"accuracy": Entry(text, right / n), "": Entry("", bar=Bar(zero, low, right / n, high))}


def summary(found: list[Trusted]) -> Table:
    rows: list[Cells] = []
    for one in found:
        n = one.numbers
        t, with_t = n["temperature"], n["calibration_error_at_temperature"]
        judged = one.judged
        right, kept = accuracy_at(judged, 0.8)
        rows.append(
            {
                "run": one.name,
                "accuracy": accuracy(int(judged.right.sum()), n["n"], 0)["accuracy"],
                "balanced": percent(n["balanced_accuracy"]),
                "macro-F1": percent(n["macro_f1"]),
                "top-5": "" if n["top5"] is None else percent(n["top5"]),
                "ECE": percent(n["calibration_error"]),
                "temperature": "" if t is None else Entry(f"{t:.2f}", t),
                "ECE with it": "" if with_t is None else percent(with_t),
                "surest 80 %": percent(right / kept),
            }
        )
    notes = [
        "Accuracy on test images in %, with Wilson's 95 % interval over images; balanced: mean over classes. ECE: mean "
        f"distance between probability and accuracy in points, {BINS} bins. Surest 80 %: accuracy on the images whose "
        "answers have the highest probabilities",
    ]
    if any(one.temperature for one in found):
        notes.append(
            "Temperature: what logits are divided by; fitted on held-out training images, never on tested ones"
        )
    if not all(one.held_out for one in found):
        notes.append("No temperature: nothing held out was predicted (split.val_fraction, or runs with split.folds)")
    if not all(one.tested for one in found):
        notes.append("folds: no run was tested, so each training image counts as the run that held it out predicted it")
    return table_of("Accuracy and calibration of each run", rows, 1, notes=notes)


def in_words(one: Trusted) -> str:
    n = one.numbers
    low, high = n["accuracy_interval"]  # wide for few images
    sure = n["confidence"]
    how = "it is overconfident" if sure > high else "it is too careful" if sure < low else "the two agree within chance"
    said = (
        f"It gets {100 * n['accuracy']:.1f} % of {n['n']} images right and gives its answers a probability of "
        f"{100 * n['confidence']:.1f} % on average: {how}."
    )
    t = n["temperature"]
    if t is not None and n["calibration_error_at_temperature"] < n["calibration_error"]:
        said += f" Logits divided by {t:.2f} bring the calibration error from {100 * n['calibration_error']:.1f} to "
        said += f"{100 * n['calibration_error_at_temperature']:.1f} points."
    return said


def by_class(one: Trusted, most: int) -> Table:
    counts = confusion(one.judged)
    own, true, said = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    rows = []
    order = sorted(range(len(one.classes)), key=lambda k: (own[k] / true[k] if true[k] else 2, one.classes[k]))
    for k in order[:most]:
        others = counts[k].copy()
        others[k] = 0
        taken = f"{one.classes[others.argmax()]} ({others.max()})" if others.max() else ""
        f1 = 2 * own[k] / (true[k] + said[k]) if true[k] + said[k] else None
        cells = {"class": one.classes[k], **accuracy(int(own[k]), int(true[k]), one.numbers["accuracy"])}
        rows.append({**cells, "F1": percent(f1), "n": number(int(true[k])), "most often taken for": taken})
    notes = ["Accuracy in % with Wilson's 95 % interval; the mark in the bar is the accuracy on all images"]
    if len(order) > most:
        notes.append(f"The worst {most} of {len(order)} classes (--most {len(order)} for all)")
    return table_of(f"{one.name}: classes, the worst first", rows, 1, notes=notes, verdict=in_words(one))


def confusions(one: Trusted, most: int) -> Table | None:
    counts = confusion(one.judged)
    true = counts.sum(axis=1)
    pairs = [(counts[i, j], i, j) for i, j in np.argwhere(counts) if i != j]
    rows: list[Cells] = [
        {
            "class": one.classes[i],
            "taken for": one.classes[j],
            "images": number(n),
            "% of the class": percent(n / true[i]),
        }
        for n, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))[:most]
    ]
    return table_of(f"{one.name}: largest confusions", rows, 1) if rows else None


def calibration(one: Trusted) -> Table:
    rows: list[Cells] = []
    for found in reliability(one.judged, 10):
        cells = accuracy(found.right, found.n, found.confidence)
        rows.append({"probability": percent(found.confidence), **cells, "n": number(found.n)})
    notes = ["Images by the probability of their answer, the mark in the bar; the point is their accuracy"]
    return table_of(f"{one.name}: how often answers of each probability are right", rows, 0, notes=notes)


def rejection(one: Trusted) -> Table:
    rows: list[Cells] = []
    judged = one.judged
    for coverage in COVERAGES:
        right, kept = accuracy_at(judged, coverage)
        cells = accuracy(right, kept, one.numbers["accuracy"])
        rows.append({"% answered": percent(coverage), **cells, "n": number(kept)})
    least, notes = one.numbers["none_below"], []
    if least is not None:
        notes.append(
            f'Answer "none of these" below a probability of {least:.2f}: {100 * KNOWN:.0f} % of held-out training '
            f"images are above it, and {100 * (1 - one.numbers['none_of_these']):.1f} % of these images"
        )
    return table_of(f"{one.name}: accuracy if only the surest images are answered", rows, 0, notes=notes)


def worst(one: Trusted, most: int) -> Table | None:
    judged = one.judged
    order = [i for i in np.argsort(-judged.confidence, kind="stable") if not judged.right[i]][:most]
    rows: list[Cells] = [
        {
            "image": one.images[i],
            "class": one.classes[judged.labels[i]],
            "taken for": one.classes[judged.predicted[i]],
            "probability": percent(float(judged.confidence[i])),
        }
        for i in order
    ]
    return table_of(f"{one.name}: worst images, the surest mistakes first", rows, 1) if rows else None


def suspicious(one: Trusted, most: int) -> Table | None:
    """Training images whose label may be wrong; None without predictions for held-out ones."""
    if one.held_out is None:
        return None
    judged, names = one.held_out.judged, list(one.held_out.images.values())
    order, wrong = suspects(judged)
    rows: list[Cells] = [
        {
            "image": names[i],
            "label": one.classes[judged.labels[i]],
            "its probability": percent(float(judged.probabilities[i, judged.labels[i]])),
            "looks like": one.classes[judged.predicted[i]],
            "probability": percent(float(judged.confidence[i])),
        }
        for i in order[:most]
        if not judged.right[i]
    ]
    verdict = f"{wrong.sum()} of {len(names)} held-out training images may have a wrong label. "
    verdict += "Look at these first." if wrong.any() else "The network takes these for other classes, but is not sure."
    title = f"{one.name}: training images whose label may be wrong"
    notes = ["Each was predicted by a network that did not train on it; sorted by the margin of its label"]
    return table_of(title, rows, 1, notes=notes, verdict=verdict) if rows else None


def flips(first: Trusted, other: Trusted, most: int) -> Table | None:
    """Images that only one of two runs gets right; None for runs of different images."""
    both = first.made, other.made
    if not all(np.array_equal(getattr(both[0], name), getattr(both[1], name)) for name in ("index", "labels")):
        log.info(f"no comparison of {first.name} and {other.name}: they were not tested on the same images")
        return None
    ours, theirs, p = mcnemar(*both)
    rows = []
    names = [method_title(one.record) for one in (first, other)]
    names = names if names[0] != names[1] else [first.name, other.name]
    for one, against, name in ((first, other, names[0]), (other, first, names[1])):
        wrong = against.judged
        sure = wrong.confidence
        for i in sorted(np.flatnonzero(one.judged.right & ~wrong.right), key=lambda i: -sure[i])[:most]:
            image: Cells = {"image": one.images[i], "class": one.classes[one.made.labels[i]], "right": name}
            image["the other's answer"] = against.classes[wrong.predicted[i]]
            rows.append(image | {"its probability": percent(float(sure[i]))})
    verdict = (
        f"{names[0]} alone gets {ours} images right, and {names[1]} alone {theirs}: "
        f"{'more than chance' if p < 0.05 else 'that may be chance'} (McNemar, exact, p={p:.2g})."
    )
    title = f"Images that one of two runs gets right: {first.name}; {other.name}"
    return table_of(title, rows, 1, verdict=verdict) if rows else Table(title, ["image"], [], 1, verdict=verdict)


def trust_tables(found: list[Trusted], most: int) -> list[Table]:
    of_all = summary(found)
    made: list[Table | None] = [of_all]
    if len(found) > MOST:
        of_all.notes.append(f"Classes and images are shown for up to {MOST} runs: name those to look at")
        return [of_all]
    asked: set[int] = set()  # held-out images that were shown; seeds of one method share them
    for one in found:
        made += [by_class(one, most), confusions(one, most), calibration(one), rejection(one)]
        made.append(worst(one, most) if one.tested else None)
        if id(one.held_out) not in asked:
            made.append(suspicious(one, most))
            asked.add(id(one.held_out))
    tested = [one for one in found if one.tested]
    made += [flips(tested[0], other, most) for other in tested[1:]]
    return [table for table in made if table]


def as_json(found: list[Trusted]) -> str:
    """All numbers, as fractions, with the whole confusion matrix and every suspicious image."""
    runs = []
    for one in found:
        order, wrong = suspects(one.held_out.judged) if one.held_out else (np.zeros(0, int), np.zeros(0, bool))
        names = list(one.held_out.images.values()) if one.held_out else []
        judged = one.judged
        surest = {c: accuracy_at(judged, c) for c in COVERAGES}
        runs.append(
            {
                "run_id": run_id(one.record),
                "tested": one.tested,
                **one.numbers,
                "classes": one.classes,
                "confusion": confusion(judged).tolist(),
                "reliability": [vars(b) for b in reliability(judged)],
                "coverage": {str(c): right / kept for c, (right, kept) in surest.items()},
                "suspicious": [names[i] for i in order if wrong[i]],
            }
        )
    return json.dumps({"runs": runs}, indent=1, ensure_ascii=False) + "\n"
