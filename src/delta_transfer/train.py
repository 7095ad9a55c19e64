"""delta-run, the single entry point of all runs. cli/run.py is the command, and experiment/experiment.py the run.

torchrun --nproc-per-node=2 -m delta_transfer.train dataset=cub ...     one run on two GPUs
"""

from .cli.run import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
