"""A finished run from its folder alone: its record, configuration, network and class names.

    run = finished(run_folder("results/runs/cub-resnet18-delta-s0-0123abcd"))
    logits = run.network(images)["logits"]

Its images and its source weights need not be here; `replay.py` rebuilds those, too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.errors import UserError
from ..common.options import OptionError
from ..engine.config import RunConfig, run_config_from
from ..methods import METHODS
from ..models import Network
from ..models.portable import bare_network
from ..records.checked import MODEL, load_trained
from ..records.reading import method_of, read
from ..records.run_directory import class_names, unreadable

RUNS = Path("results/runs")  # delta-run puts them there by default


@dataclass(frozen=True)
class Finished:
    record: dict[str, Any]  # summary.json, with its `folder`
    config: RunConfig
    network: Network  # the fine-tuned one, frozen, on the CPU, without taps
    class_names: tuple[str, ...]  # in the order of the logits

    @property
    def run_id(self) -> str:
        return str(self.record["run_id"])


def finished(folder: Path) -> Finished:
    """The run in `folder`, whose outputs must be classes, properties or values.

    Raises UserError if the run failed, has another task or no network, or has a record that cannot be read.
    """
    record = record_of(folder)
    config = config_of(record)
    if config.task == "verification":
        raise UserError(
            f"{record['run_id']} has task=verification, whose test images have none of its classes. Name a run that "
            "tells classes apart (task=classification)."
        )
    weights = trained_weights(record)
    backbone, classes = config.backbone, record.get("num_classes")
    head = weights.get(f"{backbone.head}.weight")
    if not isinstance(classes, int) or head is None or head.dim() != 2 or len(head) != classes:
        raise not_of_this_run(record, f"its layer {backbone.head} is not a head of {classes} classes.")
    try:
        network = backbone.network_of(bare_network(backbone, classes, weights), tapped=False).freeze()
    except RuntimeError as error:
        raise not_of_this_run(record, error) from None
    return Finished(record, config, network, class_names(record))


def run_folder(name: str | Path) -> Path:
    """A run's folder from its path, from the path of a file in it, or from the run's id below results/runs.

    Raises UserError if no finished run is there.
    """
    named = Path(name).parent if Path(name).is_file() else Path(name)
    places = list(dict.fromkeys([named, RUNS / named]))  # an absolute path stays the same
    for place in places:
        if (place / "summary.json").is_file():
            return place
    raise UserError(
        f"{name}: there is no finished run (summary.json) in {' or '.join(str(place) for place in places)}. "
        "Name a run's folder, e.g. results/runs/<run id>."
    )


def record_of(folder: Path) -> dict[str, Any]:
    """summary.json. Raises UserError if the run failed, or for a record that cannot be read."""
    record = read(folder)
    problem = record.get("unreadable") or unreadable(record)
    if problem or record.get("error"):
        raise UserError(f"{folder / 'summary.json'}: {problem or 'the run failed: ' + str(record['error'])}")
    return record


def config_of(record: dict[str, Any]) -> RunConfig:
    """A record's configuration, checked like a new run's. Raises UserError if this version cannot read it."""
    try:
        return run_config_from(record["config"])
    except (UserError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OptionError) and error.key == METHODS.key:  # of a program that is not imported here
            raise UserError(
                f"{record['run_id']}: no method {method_of(record)} is known here. If a file of yours "
                'registers it, such as my_run.py, import that first: python -c "import my_run; from '
                'delta_transfer.cli.predict import main; main()" RUN IMAGES (or cli.export).'
            ) from None
        raise UserError(f"{record['run_id']}: this version cannot read the record's config: {error}") from None


def trained_weights(record: dict[str, Any]) -> dict[str, Tensor]:
    """The trained weights of the run. Raises UserError if its folder has none, or a damaged file."""
    path = record["folder"] / MODEL
    if not path.is_file():
        raise UserError(
            f"{path} is not there (published records come without their networks): take a run made here, or make "
            "this one again with delta-run."
        )
    try:
        return load_trained(record["folder"], record)
    except (ValueError, OSError) as error:
        raise not_of_this_run(record, error) from None


def not_of_this_run(record: dict[str, Any], error: object, file: str = MODEL) -> UserError:
    return UserError(f"{record['folder'] / file} is not of this run: {str(error).strip().splitlines()[0]}")
