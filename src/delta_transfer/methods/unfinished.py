"""What a long computation before training has done so far."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

State = dict[str, Any]  # tensors, numbers, and containers of them


class Unfinished:
    """Is told of each part of a long `fit`. A run has one that stores the parts and resumes; this one does not."""

    def load(self) -> State | None:
        """What an interrupted `fit` had noted; None if there is nothing to go on with."""
        return None

    def note(self, what: str, done: int, total: int, state: State) -> None:
        """Part `done` of `total` (0: unknown) is done.

        state: what is needed to go on, beside what was noted before. It is kept now and then, and with the last part.
        """

    def show(self, what: str, done: int, total: int, within: str = "") -> None:
        """`done` parts are done, and the next one is at `within`. Nothing is kept."""

    def counted(self, what: str, batches: Iterable[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
        """The batches (inputs, labels). Shows how many inputs are done, if the batches know how many they are."""
        total, done = getattr(batches, "inputs", 0), 0
        for inputs, labels in batches:
            yield inputs, labels
            done += len(labels)
            self.show(what, done, total)


NOTHING_KEPT = Unfinished()
