"""How the jobs of one command ended, wherever they ran, and the table of it."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

STATES = ("done", "skipped", "failed", "in work", "stopped")


class Outcome:
    """What a job returns; `of_this_command` has all of them.

    A job that raised would end a sweep: Hydra's sweeper reports the first exception and starts no further batch. What
    jobs return it shows to nobody. But a return value is either made in this process or, when a launcher's worker sends
    it, unpickled here: both are noted.
    """

    of_this_command: "list[Outcome]" = []

    def __init__(
        self, overrides: list[str], state: str, reason: str, unseen: bool, of_sweep: bool, record: dict | None = None
    ):
        self.overrides, self.state, self.reason = overrides, state, reason
        self.record = record  # the summary of a run that finished or failed
        self.unseen, self.of_sweep = unseen, of_sweep  # unseen: a worker wrote the reason into a file
        self.of_this_command.append(self)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.of_this_command.append(self)


def show(outcomes: Sequence[Outcome]) -> None:
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print()
    console.print(table(outcomes))


def table(outcomes: Sequence[Outcome]) -> Table:
    """Runs by state; those that were not made, one by one: what is peculiar to them, and the reason's first line."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    made.add_column("runs", justify="right")
    made.add_column("")
    made.add_column("which", overflow="fold")
    made.add_column("reason", overflow="fold")
    common = set.intersection(*(set(outcome.overrides) for outcome in outcomes))
    for state in STATES:
        members = [outcome for outcome in outcomes if outcome.state == state]
        if members and state in ("done", "skipped"):
            made.add_row(str(len(members)), state)
            continue
        for number, outcome in enumerate(members):
            which = " ".join(override for override in outcome.overrides if override not in common)
            reason = (outcome.reason.splitlines() or [""])[0]
            # Text: brackets in it are no markup.
            made.add_row("" if number else str(len(members)), "" if number else state, Text(which), Text(reason))
    return made
