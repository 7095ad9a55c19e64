"""The source network of the embedded data sets. A run of its own trains it before the first run that needs it."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from ..common.console import log
from ..common.errors import UserError
from ..engine import devices
from ..engine.config import RunConfig
from ..records.checked import MODEL, load_trained
from ..records.files import make_output_folder
from ..records.locks import InUse, wait_for_lock
from ..records.run_directory import RunResult
from .experiment import run

_tried: dict[tuple[str, str], str | UserError] = {}  # by folder and device: once per command


def pretrain(recipe: RunConfig) -> str:
    """Path of the weights that the run `recipe` trains. Raises UserError if it fails. It is tried once per command."""
    key = recipe.results_dir, recipe.device
    if key not in _tried:
        try:
            _tried[key] = _train(recipe)
        except UserError as error:
            _tried[key] = UserError(f"Source network of the embedded data: {error}")
    found = _tried[key]
    if isinstance(found, UserError):
        raise found
    return found


def _train(recipe: RunConfig) -> str:
    """Path of the weights."""
    folder = Path(recipe.results_dir)
    make_output_folder(folder)
    # One of several workers trains the network, and the others wait for it. Under torchrun all train it together.
    lock = nullcontext() if devices.shared() else wait_for_lock(folder / ".lock", "trains the source network")
    with lock:
        log.info("Source network of the embedded data (delta-pretrain):")
        summary = _when_free(lambda: run(recipe)).summary
        trained = folder / "runs" / summary["run_id"]
        path = trained / MODEL
        try:
            load_trained(trained, summary)
        except (ValueError, OSError) as error:
            log.info(f"{path} is damaged ({error}): it is trained again")
            (trained / "summary.json").unlink()
            _when_free(lambda: run(recipe))
    return str(path)


def _when_free(make: Callable[[], RunResult]) -> RunResult:
    """Waits while another process, such as a delta-pretrain, makes the run."""
    told = False
    while True:
        try:
            return make()
        except InUse as error:
            if not told:
                log.info(f"{error}: waiting")
            told = True
            time.sleep(5)
