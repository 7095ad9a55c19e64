"""Copy the records of finished runs (summary and metrics) to a folder to commit, without this machine's paths.

    python scripts/publish_records.py results/cub50 results/published/cub50/records

`delta-report results/published/cub50/records` makes the same tables from the copies as from the runs.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

PATH = re.compile(r"""(?:^|(?<=[=:,'"[{]))[/~][^,'"\]}]*""")


def without_paths(value):
    """The same record with every absolute path cut to its last component, also inside command lines."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and "/" in value:
        return " ".join(_cut(word) for word in value.split(" "))
    return value


def _cut(word: str) -> str:
    """key=/a/b -> key=b, [{use:/a/b,taps:[c]}] -> [{use:b,taps:[c]}]"""
    return PATH.sub(lambda found: Path(found[0]).name, word)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results directory, holding runs/")
    parser.add_argument("target", type=Path, help="folder for the copies")
    arguments = parser.parse_args()
    copied = 0
    for path in sorted(arguments.results.glob("runs/*/summary.json")):
        record = without_paths(json.loads(path.read_text()))
        target = arguments.target / path.parent.name / "summary.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        shutil.copyfile(path.with_name("metrics.jsonl"), target.with_name("metrics.jsonl"))
        copied += 1
    print(f"{copied} records in {arguments.target}")


if __name__ == "__main__":
    main()
