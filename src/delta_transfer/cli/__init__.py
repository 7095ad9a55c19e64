"""The commands. Every command imports this package before torch."""

from ..common.cores import begin_command

begin_command()
