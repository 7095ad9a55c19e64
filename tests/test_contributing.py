"""The recipes of CONTRIBUTING.md and docs/extend.md work as they are printed; the files that notes name exist."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .trees import write_image

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "design.md", ROOT / "docs" / "extend.md"]
BLOCK = re.compile(r'(?m)^```\w+ title="(.+)"\n((?s:.*?))^```$')
SPECIES = ("birch", "maple", "oak")


def recipes(page: str) -> dict[str, str]:
    """The text of each block with a title, by that title; a file may have several."""
    found: dict[str, str] = {}
    for title, text in BLOCK.findall((ROOT / page).read_text()):
        found[title] = found.get(title, "") + "\n\n" + text
    return found


def new_files(page: str) -> set[str]:
    return {title for title in recipes(page) if " " not in title and not (ROOT / title).exists()}


def write_leaves(root: Path) -> None:
    """Twelve images of three classes, listed once in train.txt and test.txt and once in labels.csv."""
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for number in range(12):
        name, split = SPECIES[number % 3], "test" if number >= 9 else "train"
        write_image(root / "images" / name / f"{number}.png", number)
        lists[split].append(f"{name}/{number}.png")
    for split, lines in lists.items():
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    lines = [f"{file},{file.split('/')[0]},{split}" for split, files in lists.items() for file in files]
    (root / "labels.csv").write_text("file,class,split\n" + "\n".join(lines) + "\n")


def test_each_recipe_makes_as_many_files_as_it_says():
    assert {Path(title).name for title in new_files("CONTRIBUTING.md")} == {
        *("embedding_distance.py", "embedding.yaml"),
        "leaves.yaml",
        *("petals.py", "petals.yaml"),
        "shufflenet.yaml",
        "mean.py",
    }


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package with every recipe of CONTRIBUTING.md, and beside it the files of docs/extend.md."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "conf"))
    shutil.copytree(ROOT / "conf", root / "conf")
    (root / "src" / "delta_transfer" / "conf").symlink_to(root / "conf")
    for page in ("CONTRIBUTING.md", "docs/extend.md"):
        for title, text in recipes(page).items():
            path, _, above = title.partition(" above ")
            path = root / path
            path.parent.mkdir(parents=True, exist_ok=True)
            before = path.read_text() if path.exists() else ""
            place = before.index(f"@dataclass\n{above}(") if above else len(before)
            path.write_text(before[:place] + text + "\n\n" + before[place:])
    road = root / "src" / "delta_transfer" / "experiment" / "experiment.py"
    text = road.read_text().replace("*(OnLine(", "HeadNorm(state), *(OnLine(")
    road.write_text(text.replace("Checkpoints, OnLine", "Checkpoints, HeadNorm, OnLine"))
    write_leaves(root / "data" / "leaves")
    shutil.copytree(root / "data" / "leaves", root / "data" / "petals")
    return root


def test_recipes_work(copy):
    """One sweep tries all of them: the sum of both methods, on both data sets."""
    command = [sys.executable, "my_run.py", "--config-dir", "my_conf", "-m", "dataset=leaves,petals"]
    command += ["reg=sum", "+reg@reg.terms.e=embedding", "+reg@reg.terms.m=mine", "reg.terms.e.unit_norm=true"]
    command += ["optimizer=rmsprop", "optimizer.smoothing=0.9", "schedule.decay=linear", "schedule.lr=1e-4"]
    command += ["average=mean"]
    command += ["backbone=shufflenet", "backbone.weights=none", "backbone.image_size=32", "backbone.resize=36"]
    command += ["schedule.iterations=2", "schedule.batch_size=4", "schedule.log_every=1", "device=cpu"]
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted((copy / "results" / "runs").iterdir())
    assert [run.name.rsplit("-", 1)[0] for run in runs] == [
        f"{data}-shufflenet_v2_x0_5-embedding_mine-s0" for data in ("leaves", "petals")
    ]
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["n_train"], summary["n_test"], summary["num_classes"]) == (9, 3, 3)
        assert summary["titles"] == {"method": "Embedding+Mine", "dataset": run.name.split("-")[0].capitalize()}
        assert summary["identity"]["average"] == {"name": "mean"}
        assert summary["identity"]["optimizer"] == {"name": "rmsprop", "smoothing": 0.9}
        first, last = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
        assert min(first[key] for key in ("e.embedding", "m.embedding", "attention_head_norm")) > 0
        assert last["lr"] == first["lr"] / 2


@pytest.mark.slow  # a minute where there is no cache yet
def test_recipes_pass_the_type_checker(copy, pytestconfig):
    new = [copy / title for title in sorted(new_files("CONTRIBUTING.md")) if title.endswith(".py")]
    settings = ["--config-file", ROOT / "pyproject.toml", "--follow-imports=silent"]
    settings += ["--cache-dir", pytestconfig.cache.mkdir("mypy_of_recipes")]
    command = [sys.executable, "-m", "mypy", *map(str, [*settings, *new])]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_long():
    """docs/design.md: the road of a run and the loop are read from top to bottom."""
    source = ROOT / "src" / "delta_transfer"
    most = {source / "engine" / "loop.py": 200, source / "experiment" / "experiment.py": 300}
    lines = {path: len(path.read_text().splitlines()) for path in source.rglob("*.py")}
    assert lines.keys() > most.keys()
    assert [path.name for path, count in lines.items() if count > most.get(path, 400)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_yamls_that_are_named_exist(page):
    ours = [
        f"/{path.relative_to(ROOT).as_posix()}" for kind in ("py", "yaml") for path in ROOT.glob(f"[a-z]*/**/*.{kind}")
    ]
    ours += [f"/{title}" for of in ("CONTRIBUTING.md", "docs/extend.md") for title in recipes(of)]
    named = re.findall(r"`([\w./]+\.(?:py|yaml))`", page.read_text())
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in ours)] == []
