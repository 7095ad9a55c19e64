"""The commands. Whatever starts one, or a launcher's worker, imports this package before it imports torch."""

from ..common.cores import spin_briefly

spin_briefly()
