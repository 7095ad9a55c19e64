"""The commands. Every command and every launcher's worker imports this package before torch."""

from ..common.cores import begin_command

begin_command()
