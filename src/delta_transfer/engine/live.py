"""Watching a run from outside: what metrics.jsonl gets, shown elsewhere too, under the same names.

metrics.jsonl stays the record.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from ..common.options import require
from ..records.run_directory import RunDirectory


def require_live_view(logging: str) -> None:
    """Raises UserError if what `logging` asks for is not installed."""
    require(
        logging == "none" or find_spec("tensorboard") is not None,
        "logging=tensorboard needs the package tensorboard: pip install 'delta-transfer[tensorboard]'",
    )


@contextmanager
def live_view(
    logging: str, directory: RunDirectory, first_iteration: int
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows a line of metrics; TensorBoard's files lie in the run's directory.

    A resumed run replaces what was shown of the iterations that it does again.
    """
    if logging == "none" or not directory.writes:
        yield lambda line: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(directory.path, purge_step=first_iteration + 1) as writer:

        def show(line: dict[str, Any]) -> None:
            for name, value in line.items():
                if name != "step":
                    writer.add_scalar(name, value, line["step"])

        yield show
