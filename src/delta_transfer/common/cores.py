"""The cores that this process may use, and the other work on them. Nothing here imports torch.

Training threads wait for one another many times in a step. They spin while they wait, to go on at once. Beside other
work, they may spin on the core that the awaited thread needs: there they spin for a short time only. It changes no
number; the number of threads would change last bits.
"""

import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # of OpenMP; the user's settings are kept
# Rounds of spinning of GNU's OpenMP, which PyTorch's Linux wheels bring. docs/performance.md has what was measured.
SPINS_BESIDE_OTHERS = 1_000
CHOSEN_ON = "DELTA_TRANSFER_SPINS_CHOSEN_ON"  # the machine for which a command set GOMP_SPINCOUNT
NOTICED = 0.3  # least load of other programs at which the machine counts as busy
NOTABLE = 1.5  # least slowdown factor that a message reports
CGROUPS = Path("/sys/fs/cgroup")
of_a_command = False  # whether one of our commands runs this process, and not another program
others = 0.0  # threads of other programs that wanted a core when the command began


def begin_command() -> None:
    """Measures how busy the machine is. On a busy one threads spin briefly, also in processes that this one starts.

    Call it before torch is imported.
    """
    global of_a_command, others
    of_a_command, others = True, busy_others()
    if others >= NOTICED and "torch" not in sys.modules and not any(name in os.environ for name in SETTINGS):
        os.environ |= {"GOMP_SPINCOUNT": str(SPINS_BESIDE_OTHERS), CHOSEN_ON: platform.node()}


def choose_anew_elsewhere() -> None:
    """In a launcher's worker, forgets what the command chose for another machine, such as a cluster's login node."""
    if os.environ.get(CHOSEN_ON, here := platform.node()) != here:
        for name in (CHOSEN_ON, "GOMP_SPINCOUNT"):
            os.environ.pop(name, None)
        begin_command()


def usable_cores() -> int:
    """The cores that this process may run on; fewer if a control group (a container) limits its processor time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(int, _quotas())]))


def _quotas() -> list[float]:
    """The limits of the control groups that this process is in, in cores."""
    own = next((line[3:].strip("/") for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")), "")
    folders = [CGROUPS / own, *(CGROUPS / own).parents] if own else [CGROUPS]
    limits = [" ".join(_lines(folder / "cpu.max")) for folder in folders if folder.is_relative_to(CGROUPS)]
    limits.append(" ".join(line for name in ("quota", "period") for line in _lines(CGROUPS / f"cpu/cpu.cfs_{name}_us")))
    found = [limit.split() for limit in limits]
    return [int(quota) / int(period) for quota, period in (f for f in found if len(f) == 2) if quota.isdecimal()]


def busy_others() -> float:
    """The approximate number of threads of other programs that want a core; 0 if the system does not tell.

    This is the smaller of two numbers. The load of the last minute still counts programs that ended, such as this
    command's predecessor. A look at the moment also counts threads that run by chance, such as this process' own.
    """
    try:
        load = os.getloadavg()[0]
        if load < NOTICED:
            return 0.0
        return max(0.0, min(load, fmean(_running()) - 1))
    except (OSError, ValueError):  # no /proc/stat, so that there is nothing to take the mean of
        return 0.0


def _running(looks: int = 10, seconds: float = 0.005) -> Iterator[int]:
    """The number of threads on this machine that run or wait for a core, this one included, several times."""
    for _ in range(looks):
        yield from (int(line.split()[1]) for line in _lines(Path("/proc/stat")) if line.startswith("procs_running"))
        time.sleep(seconds)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


USABLE = usable_cores()
