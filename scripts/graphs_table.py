"""The table of molecules beside GTOT-Tuning's: BBBP and SIDER, the GCN, seven methods, ten seeds.

    python scripts/graphs_table.py --data DIR [--results DIR] [--only bbbp] [--methods l2] [--as-published] [WORD ...]
    python scripts/graphs_table.py --data DIR --choose --epochs 10        # the strengths alone, with short runs

DIR holds graphs/BBBP.csv, graphs/SIDER.csv and graphs/weights. The script tries every strength on the validation
molecules with two seeds, adds decades until the best is not at an edge, and then trains with it: first all methods with
five seeds, then with ten, so that a stopped table has all methods. The command resumes: finished runs are skipped. Runs
have 100 epochs, and the last one counts; with --as-published the epoch that is best on validation molecules counts.
Runs with --as-published or --epochs have their own folders. WORDs such as precision=bf16, which takes two thirds of the
time, go to all runs: give those a --results of their own.

    delta-report results/graphs_table/last/bbbp --metric test_roc_auc --against gtot_supervised
"""

import argparse
from pathlib import Path

from studies import Study, Trial

ROUNDS = (5, 10)  # seeds of all methods
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
    parser.add_argument("--choose", action="store_true", help="choose the strengths, and train nothing with them")
    parser.add_argument("--epochs", type=int, help="length of a run in place of 100")
    arguments = parser.parse_args()
    words = [*arguments.words, *(AS_PUBLISHED if arguments.as_published else ())]
    folder = "best_validation" if arguments.as_published else "last"
    if arguments.epochs:
        words, folder = [*words, f"schedule.epochs={arguments.epochs}"], f"{folder}_{arguments.epochs}"
    studies = [
        Study(
            ["+experiment=graphs_main", f"dataset={name}", "backbone=gcn", f"data_dir={arguments.data}", *words],
            arguments.results / folder / name,
            ON_VALIDATION,
            STRENGTHS,
            LIMITS,
        )
        for name in arguments.only.split(",")
    ]
    methods = arguments.methods.split(",")
    for seeds in ROUNDS:
        for study in studies:
            for method in methods:
                if arguments.choose:
                    study.strength(method)
                else:
                    study.final(method, seeds)


if __name__ == "__main__":
    main()
