"""The commands. Whatever starts one, or a launcher's worker, imports this package before it imports torch."""

from ..common.cores import begin_command

begin_command()
