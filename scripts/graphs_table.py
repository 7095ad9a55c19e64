"""The table of molecules beside GTOT-Tuning's: BBBP and SIDER, the GCN, seven methods, ten seeds.

    python scripts/graphs_table.py --data DIR [--results DIR] [--only bbbp] [--methods l2] [--as-published] [WORD ...]

DIR holds graphs/BBBP.csv, graphs/SIDER.csv and graphs/weights. The script tries every strength on the validation
molecules with two seeds and runs of 20 epochs, in the folder `strengths`, and adds decades until the best is not at an
edge. It then trains with the best: first all methods with five seeds, then with ten, so that a stopped table has all
methods. The command resumes: finished runs are skipped. Final runs have 100 epochs, and the last one counts; with
--as-published the epoch that is best on validation molecules counts, for strengths too, in folders of their own. WORDS
such as precision=bf16, which takes two thirds of the time on processors that have it, go to all runs: give those a
--results of their own.

    delta-report results/graphs_table/last/bbbp --metric test_roc_auc --against gtot_supervised
"""

import argparse
from pathlib import Path

from studies import Study, Trial

ROUNDS = (5, 10)  # seeds of all methods
CHOOSING = ("schedule.epochs=20",)  # for the strengths
DATASETS = ("bbbp", "sider")
METHODS = ("l2", "delta_noatt", "l2_sp", "l2_fe", "delta", "stochnorm", "bss")
STRENGTHS = {  # decades of alpha that are tried first; DELTA's is a sum over all nodes of a batch
    "delta_noatt": (-11, -10, -9),
    "delta": (-11, -10, -9),
    "l2_sp": (-4, -3, -2),
    "bss": (-4, -3, -2),
}
LIMITS = (-13, 1)
ON_VALIDATION = Trial(("seed=0,1",), range(2), 2, "val_roc_auc")
AS_PUBLISHED = ("average=best_validation", "schedule.eval_epochs=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="further words of delta-run")
    parser.add_argument("--data", required=True, help="folder that holds graphs")
    parser.add_argument("--results", type=Path, default=Path("results/graphs_table"))
    parser.add_argument("--only", default=",".join(DATASETS), help="data sets, in order (default: both)")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, in order (default: all)")
    parser.add_argument("--as-published", action="store_true", help="stop early on validation molecules")
    arguments = parser.parse_args()
    words = [*arguments.words, *(AS_PUBLISHED if arguments.as_published else ())]
    folder = arguments.results / ("best_validation" if arguments.as_published else "last")

    def study(name: str, *more: str, folder: Path) -> Study:
        common = ["+experiment=graphs_main", f"dataset={name}", "backbone=gcn", f"data_dir={arguments.data}"]
        return Study([*common, *words, *more], folder / name, ON_VALIDATION, STRENGTHS, LIMITS)

    names = arguments.only.split(",")
    choosing = {name: study(name, *CHOOSING, folder=folder / "strengths") for name in names}
    final = {name: study(name, folder=folder) for name in names}
    for seeds in ROUNDS:
        for name in names:
            for method in arguments.methods.split(","):
                final[name].run(method, *choosing[name].strength(method), f"seed=range({seeds})")


if __name__ == "__main__":
    main()
