"""Measures of how far a network can be trusted, from labels (N,) and logits (N, K). Pure functions, rates in 0..1."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy

CONFIDENCE = 0.95
BINS = 15  # of the calibration error, as in Guo et al. (ICML 2017)
KNOWN = 0.95  # fraction of held-out images above the threshold of "none of these"


@dataclass(frozen=True)
class Judged:
    """The outputs of a network for images whose labels are known."""

    labels: np.ndarray  # (N,)
    probabilities: np.ndarray  # (N, K)

    @cached_property
    def predicted(self) -> np.ndarray:
        return self.probabilities.argmax(axis=1)

    @cached_property
    def confidence(self) -> np.ndarray:
        """The largest probability of each image."""
        return self.probabilities.max(axis=1)

    @cached_property
    def right(self) -> np.ndarray:
        return self.predicted == self.labels


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    return scipy.special.softmax(logits.astype("float64") / temperature, axis=1)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate of `right` in `n` images; (0, 1) without images."""
    if not n:
        return 0.0, 1.0
    # SciPy has it as a part of a test, which takes a millisecond for its p-value.
    z, p = float(scipy.special.ndtri((1 + CONFIDENCE) / 2)), right / n
    whole = 2 * (n + z**2)
    centre, half = (2 * n * p + z**2) / whole, z / whole * math.sqrt(4 * n * p * (1 - p) + z**2)
    return (centre - half if right else 0.0), (centre + half if right < n else 1.0)


def confusion(judged: Judged) -> np.ndarray:
    """(K, K): the number of images by true class (row) and predicted class (column)."""
    count = judged.probabilities.shape[1]
    return np.bincount(judged.labels * count + judged.predicted, minlength=count**2).reshape(count, count)


def averages(counts: np.ndarray) -> dict[str, float]:
    """Balanced accuracy, the mean over classes with images; macro-F1, over classes with images or predictions."""
    own, true, said = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    recall = own[true > 0] / true[true > 0]
    f1 = 2 * own[true + said > 0] / (true + said)[true + said > 0]
    return {"balanced_accuracy": float(np.mean(recall)), "macro_f1": float(np.mean(f1))}


def top_k(judged: Judged, k: int) -> float:
    """The fraction of images whose label is among the k largest probabilities."""
    own = judged.probabilities[np.arange(len(judged.labels)), judged.labels]
    return float(((judged.probabilities > own[:, None]).sum(axis=1) < k).mean())


# ---- calibration -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """The images whose confidence is in one of BINS equal parts of 0..1."""

    n: int
    confidence: float  # mean
    right: int


def reliability(judged: Judged, bins: int = BINS) -> list[Bin]:
    """The bins with images, by rising confidence."""
    place = np.minimum((judged.confidence * bins).astype(int), bins - 1)
    found = [place == i for i in np.unique(place)]
    return [Bin(int(in_.sum()), float(judged.confidence[in_].mean()), int(judged.right[in_].sum())) for in_ in found]


def calibration_error(judged: Judged) -> float:
    """ECE = sum over bins of n_b / N * |accuracy_b - confidence_b|."""
    return sum(abs(b.right - b.n * b.confidence) for b in reliability(judged)) / len(judged.labels)


def temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """The T in 0.05..20 with the smallest cross-entropy of softmax(logits / T) (Guo et al., ICML 2017)."""

    def loss(log_t: float) -> float:
        log_p = scipy.special.log_softmax(logits.astype(float) / np.exp(log_t), axis=1)
        return -float(log_p[np.arange(len(labels)), labels].mean())

    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


# ---- which images to answer, which to look at ------------------------------------------------------------


def accuracy_at(judged: Judged, coverage: float) -> tuple[int, int]:
    """The number of right images among the surest, and the number of these: `coverage` of all, at least one."""
    kept = np.argsort(-judged.confidence, kind="stable")[: max(1, round(coverage * len(judged.labels)))]
    return int(judged.right[kept].sum()), len(kept)


def none_of_these(held_out: Judged) -> float:
    """The probability below which no class is answered. The fraction KNOWN of the held-out images is above it."""
    return float(np.quantile(held_out.confidence, 1 - KNOWN))


def suspects(held_out: Judged) -> tuple[np.ndarray, np.ndarray]:
    """Images in the order of the probability of a wrong label, and by image whether the label counts as wrong.

    They are sorted by the margin p(label) - max over other classes p, the smallest first. A label counts as wrong if
    another class is the likeliest of those whose probability reaches their mean over the images with that label
    (confident learning: Northcutt, Jiang, Chuang, JAIR 2021). The networks must not have trained on the image.
    """
    labels, p = held_out.labels, held_out.probabilities
    each = np.arange(len(labels))
    others = p.copy()
    others[each, labels] = -1
    margin = p[each, labels] - others.max(axis=1)
    usual = np.array([p[labels == k, k].mean() if (labels == k).any() else 2.0 for k in range(p.shape[1])])
    sure = np.where(p >= usual, p, -1)
    wrong = (sure.max(axis=1) >= 0) & (sure.argmax(axis=1) != labels)
    return np.argsort(margin, kind="stable"), wrong
