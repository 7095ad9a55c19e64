"""Are two images of one class? Accuracy over folds and ROC of similarities of pairs (the protocol of LFW's view 2)."""

import numpy as np

FARS = (1e-2, 1e-3)  # false accept rates of the reported true accept rates, if there are 1/FAR different pairs


def pair_metrics(similarities: np.ndarray, same: np.ndarray, fold: np.ndarray) -> dict[str, float]:
    """Rates in percent, their standard deviation over folds (n - 1) in points, AUC in 0..1; NaN if a similarity is."""
    accuracies, _ = fold_accuracies(similarities, same, fold)
    false_accepts, true_accepts = roc(similarities, same)
    found = {
        "pair_accuracy": 100 * accuracies.mean(),
        "pair_accuracy_std": 100 * accuracies.std(ddof=1),
        "auc": np.trapezoid(true_accepts, false_accepts),
    }
    for rate in FARS:
        if (~same).sum() * rate >= 1:
            found[f"tar_at_far_{rate:g}"] = 100 * true_accepts[false_accepts <= rate].max()
    finite = np.isfinite(similarities).all()
    return {name: float(value) if finite else float("nan") for name, value in found.items()}


def fold_accuracies(similarities: np.ndarray, same: np.ndarray, fold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The accuracy of each fold with the threshold that is best on all others, and these thresholds."""
    folds = np.unique(fold)
    thresholds = np.array([best_threshold(similarities[fold != k], same[fold != k]) for k in folds])
    right = [((similarities >= t) == same)[fold == k].mean() for k, t in zip(folds, thresholds, strict=True)]
    return np.array(right), thresholds


def best_threshold(similarities: np.ndarray, same: np.ndarray) -> float:
    """The least similarity at which pairs count as the same.

    It lies halfway between two similarities that occur; among equally good thresholds it is the lowest.
    """
    order = np.argsort(similarities, kind="stable")
    values, same = similarities[order], same[order]
    # right[i]: the number of right pairs if the first i count as different.
    right = np.concatenate([[0], np.cumsum(~same)]) + same.sum() - np.concatenate([[0], np.cumsum(same)])
    between = np.concatenate([[values[0] - 1], (values[:-1] + values[1:]) / 2, [values[-1] + 1]])
    # No threshold lies between equal similarities.
    right[1:-1][values[:-1] == values[1:]] = -1
    return float(between[right.argmax()])


def roc(similarities: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true accept rates, both rising from 0 to 1, with each occurring similarity as the threshold."""
    order = np.argsort(-similarities, kind="stable")
    values, same = similarities[order], same[order]
    last_of_equal = np.append(values[:-1] != values[1:], True)
    rates = [np.cumsum(which)[last_of_equal] / which.sum() for which in (~same, same)]
    false_accepts, true_accepts = (np.concatenate([[0.0], rate]) for rate in rates)
    return false_accepts, true_accepts
