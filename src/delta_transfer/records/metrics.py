"""The metrics by which runs are compared: their names, their units, and which direction is better."""

import re
from dataclasses import dataclass
from typing import Any

from ..common.console import Display, Report


@dataclass(frozen=True)
class Metric:
    """A number of a record. By default it is a percentage, and more is better."""

    title: str  # in tables
    short: str = ""  # on a terminal; empty: not shown there
    task: str = "classification"  # the task whose runs have it
    percent: bool = True  # False: it has the unit of the labels
    less_is_better: bool = False

    @property
    def axis(self) -> str:
        """The title with the unit."""
        return f"{self.title} ({'%' if self.percent else 'less is better'})"

    @property
    def digits(self) -> int:
        """Decimals that are shown."""
        return 1 if self.percent else 3

    @property
    def of_differences(self) -> str:
        """The unit of a difference, in words."""
        return "in points" if self.percent else "in the labels' unit, less is better"

    def shown(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.{self.digits}f}" + " %" * self.percent

    def merit(self, value: float) -> float:
        """The value with a sign such that more is better."""
        return -value if self.less_is_better else value


METRICS = {
    "test_top1": Metric("Test top-1 accuracy", "test top-1"),
    "val_top1": Metric("Validation top-1 accuracy", "val top-1"),
    "test_balanced_accuracy": Metric("Test balanced accuracy"),
    "val_balanced_accuracy": Metric("Validation balanced accuracy"),
    # Runs of other tasks have tables of their own.
    "test_pair_accuracy": Metric("Test pair accuracy", "test pairs", "verification"),
    "test_roc_auc": Metric("Test ROC-AUC", "test ROC-AUC", "graph_properties"),
    "val_roc_auc": Metric("Validation ROC-AUC", "val ROC-AUC", "graph_properties"),
    "test_rmse": Metric("Test RMSE", "test RMSE", "graph_regression", percent=False, less_is_better=True),
    "val_rmse": Metric("Validation RMSE", "val RMSE", "graph_regression", percent=False, less_is_better=True),
}
ACCURACY = METRICS["test_top1"]
# The test metrics of other tasks.
OF_OTHER_TASKS = {
    key: one.task for key, one in METRICS.items() if one.task != "classification" and key.startswith("test_")
}
TASK_LOSSES = {"cross_entropy": "cross-entropy", "squared_error": "squared error of standardised labels"}


def measured(record: dict[str, object]) -> list[str]:
    """The metrics of a record or a line of metrics that a terminal shows, validation first."""
    found = [(key, record.get(key)) for key in sorted(METRICS, key=lambda key: key.startswith("test_"))]
    return [
        f"{METRICS[key].short} {METRICS[key].shown(value)}"
        for key, value in found
        if METRICS[key].short and isinstance(value, int | float)
    ]


# --- Lines of metrics.jsonl ---

# Keys of a line of metrics that are not loss terms.
OTHER_KEYS = re.compile(
    "step|stage|lr|loss|gradient_norm|images_per_second|train_top1|(attention|val|test)_.*", re.DOTALL
)


def is_loss(name: str) -> bool:
    """Whether a key of a metrics line is a term of the loss."""
    return not OTHER_KEYS.fullmatch(name)


def show_progress(display: Display, inputs: str, line: dict[str, Any]) -> None:
    """Shows a line of metrics: its loss terms, accuracies and speed. inputs: images or graphs."""
    losses = tuple(f"{name} {value:.3g}" for name, value in line.items() if is_loss(name))
    training = [f"train {line['train_top1']:.1f} %"] if "train_top1" in line else []
    accuracies = training + [words.replace(" top-1", "") for words in measured(line)]
    numbers = "  ".join([*accuracies, f"{line['images_per_second']:.0f} {inputs}/s"])
    display.update(line["step"], Report(numbers, losses))
