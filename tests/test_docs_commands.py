"""Every command of the README and of docs/ works. What stands in a ```bash block is run by the first rule that fits it.

    dataset.root=photos, delta-report, delta-data,      run, in a folder with a few small photos, a miniature CUB as
    delta-predict, delta-export                         /data, and finished runs; training is cut short (SMALL)
    other delta-run, delta-pretrain, torchrun           composed, checked and planned: dry_run=true, without measuring
    make, python                                        the target, or the script, exists
    eval "$(delta-run -sc install=bash)"                what it evaluates is made, and completes that command
    HARMLESS                                            nothing: they are programs of others

Of a sweep the first and the last job are made or planned. A command without a rule fails.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from delta_transfer.cli.sweep import CheckedSweeper
from delta_transfer.engine.config import check_choices
from delta_transfer.experiment import planning as plan
from delta_transfer.inspect import patches

from .miniature import composed, delta_run, source_for, write_cub
from .test_plan import COST

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
HARMLESS = ("cd ", "git clone ", "pip install ", "source .venv/bin/activate")
# In the place of what a real run on photos says; keys that it does not have are added.
SMALL = {
    "backbone": "small_resnet",
    "backbone.weights": "source.safetensors",
    "backbone.image_size": "16",
    "backbone.resize": "20",
    "backbone.taps": "[layer1.1.conv2]",
    "schedule.iterations": "2",
    "schedule.batch_size": "4",
    "device": "cpu",
}
FEW = {"reg.attention.images": "4", "reg.attention.head_epochs": "1"}
FEW_WORDS = [f"{key}={value}" for key, value in FEW.items()]
SMALL_SWEEP = ["reg=l2,delta", "reg.alpha=0.01", "seed=0", "split.folds=2", *FEW_WORDS]  # of which_is_best


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {' '.join(self.words)}"


def blocks(page: Path, language: str) -> Iterator[tuple[int, str, str]]:
    """(number of the first line, what is behind the language, the text) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(rf"(?m)^```{language}\b(.*)\n((?s:.*?))^```$", text):
        yield text[: found.start(2)].count("\n") + 1, found[1].strip(), found[2]


def commands() -> Iterator[Command]:
    for page in PAGES:
        for first, _, text in blocks(page, "bash"):
            whole = ""
            for number, line in enumerate(text.splitlines(), first):
                whole += line.removesuffix("\\")
                if line.endswith("\\"):
                    continue
                if words := shlex.split(whole, comments=True):
                    yield Command(page.name, number, tuple(words))
                whole = ""


# A command counts to the first page that has it.
COMMANDS = list({command.words: command for command in reversed([*commands()])}.values())[::-1]


# --- the folder in which they run ---


def write_photos(root: Path) -> None:
    rng = np.random.default_rng(0)
    for label, name in enumerate(("begonia", "fern", "moss")):
        (root / name).mkdir(parents=True)
        for index in range(10):
            pixels = rng.normal(90, 30, size=(24, 30, 3)) + 70 * np.eye(3)[label]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{index:04d}.jpg")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """With photos/, data/, published records in results/, and the YAMLs of the documentation."""
    folder = tmp_path_factory.mktemp("docs")
    write_photos(folder / "photos")
    write_cub(folder / "data" / "CUB_200_2011", train=10)
    (folder / "molecules.csv").write_text("smiles\nCCO\nc1ccccc1\n")
    source_for("scratch", folder)
    shutil.copytree(ROOT / "results/published/table_quick/final", folder / "results")
    for page in PAGES:
        for _, title, text in blocks(page, "yaml"):
            path = folder / re.fullmatch(r'title="(.+)"', title)[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def runs(place) -> dict[str, str]:
    """Finished runs on the photos, by what the documentation calls them; others on folds, and of a random target."""
    on_photos = ["-m", "dataset=folder", "dataset.root=photos", *(f"{key}={value}" for key, value in SMALL.items())]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert delta_run(patch, *on_photos, "reg=l2,delta", "seed=7", *FEW_WORDS) == 0
        folds = ("split.folds=2", "split.fold=0,1")
        assert delta_run(patch, *on_photos, "reg=delta_noatt", "reg.alpha=0.001,0.01", *folds) == 0
        scratch = ("reg=scratch", "source=small_resnet:source.safetensors", "backbone.weights=none")
        assert delta_run(patch, *on_photos, *scratch) == 0
    (l2,), (delta,) = (sorted((place / "results/runs").glob(f"*-{reg}-s7-*")) for reg in ("l2", "delta"))
    named = {"RUN_A": l2, "RUN_B": delta, "RUN": delta}
    return {f"{parent}{name}": str(path) for name, path in named.items() for parent in ("", "results/runs/")}


@pytest.fixture(scope="module")
def run_on_molecules(place) -> dict[str, str]:
    pytest.importorskip("rdkit")
    lines = [f"{'C' * n}O,{n % 2}" for n in range(1, 21)]
    (place / "BBBP.csv").write_text("\n".join(["smiles,p_np", *lines]))
    words = ["dataset=bbbp", f"dataset.root={place}", "dataset.cut=random", "backbone.weights=none", "reg=l2"]
    words += ["schedule.epochs=1", "schedule.batch_size=8", "device=cpu", f"results_dir={place / 'molecules'}"]
    with pytest.MonkeyPatch.context() as patch:
        assert delta_run(patch, *words) == 0
    (run,) = (place / "molecules/runs").iterdir()
    return {"MOLECULES": str(run)}


# --- the rules ---


def call(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of our program, in this process."""
    module, function = PROGRAMS[program].split(":")
    monkeypatch.setattr(sys, "argv", [program, *words])
    try:
        return getattr(import_module(module), function)() or 0
    except SystemExit as stop:
        return stop.code or 0


def shorten_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    every = CheckedSweeper.jobs

    def some(self: CheckedSweeper, words: list[str]) -> list[list[str]]:
        jobs = every(self, words)
        return [jobs[0], jobs[-1]] if len(jobs) > 2 else jobs

    monkeypatch.setattr(CheckedSweeper, "jobs", some)


def planned(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    shorten_sweeps(monkeypatch)
    return call(program, [*words, "dry_run=true"], monkeypatch)


def carried_out(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    kept = [word for word in words if word.split("=")[0] not in SMALL]
    kept += [f"{key}={value}" for key, value in SMALL.items()]
    kept.append("results_dir=tried")  # shortened sweeps lack folds, which delta-report would say
    if "+experiment=which_is_best" in words:
        kept += SMALL_SWEEP
    else:
        shorten_sweeps(monkeypatch)
    return call(program, kept, monkeypatch)


def status(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """The exit status of a command, by the rule for it; None: there is no rule."""
    program, *rest = words
    if "|" in rest:
        return status([program, *rest[:-2]], monkeypatch) if rest[-2:] == ["|", "sh"] else None
    if program == "torchrun":
        at = rest.index("-m")
        return planned("delta-run", rest[at + 2 :], monkeypatch) if rest[at + 1] == "delta_transfer.train" else None
    if program in ("delta-run", "delta-pretrain") and "--help" not in rest:
        if "dataset.root=photos" in rest:
            return carried_out(program, rest, monkeypatch)
        return planned(program, rest, monkeypatch)
    if program in PROGRAMS:
        return call(program, [word for word in rest if word != "--watch"], monkeypatch)  # which would never end
    if program == "make":
        return int(not re.search(rf"(?m)^{rest[0]}:", (ROOT / "Makefile").read_text()))
    if program == "python":
        return int(not (ROOT / rest[0]).is_file())
    if evaluated := re.fullmatch(r"eval \$\((delta-run|delta-pretrain) -sc install=bash\)", " ".join(words)):
        return is_completion(evaluated[1])
    return 0 if " ".join(words).startswith(HARMLESS) else None


def is_completion(program: str) -> int:
    module, function = PROGRAMS[program].split(":")
    start = f"import sys; sys.argv[0] = '{program}'; from {module} import {function}; {function}()"
    script = subprocess.run(
        [sys.executable, "-c", start, "-sc", "install=bash"], capture_output=True, text=True, check=True
    ).stdout
    return int(f"hydra_bash_completion {program}" not in script)


FIRST = ("README.md", "first_run.md")  # what a newcomer types; make test-all tries those of the other pages, too


@pytest.mark.parametrize(
    "command",
    [c if c.page in FIRST else pytest.param(c, marks=pytest.mark.slow) for c in COMMANDS],
    ids=str,
)
def test_a_command_of_the_documentation_works(command, place, request, monkeypatch, capfd):
    here = {"data_dir=/data": f"data_dir={place}/data"}
    if "MOLECULES" in command.words:
        here |= request.getfixturevalue("run_on_molecules")
    elif command.words[0] in ("delta-report", "delta-predict", "delta-export"):
        here |= request.getfixturevalue("runs")
    monkeypatch.chdir(place)
    monkeypatch.setattr(plan, "measure", lambda *_: COST)
    monkeypatch.setattr(patches, "COLUMNS", 1)  # fewer pictures to draw
    ended = status([here.get(word, word) for word in command.words], monkeypatch)
    assert ended is not None, f"{command}: no rule of {Path(__file__).name} says how to try this"
    assert ended == 0, f"{command}\n{''.join(capfd.readouterr())}"


def openings() -> dict[str, list[str]]:
    """The command that a YAML of conf/ opens with."""
    found = {}
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        (first, *_) = (line[2:] for line in path.read_text().splitlines() if line.startswith("# delta-"))
        found[path.relative_to(ROOT / "conf").as_posix()] = shlex.split(first)
    return found


OPENINGS = openings()
EXPERIMENTS = [name for name in OPENINGS if name.startswith("experiment/")]


def of_first_job(word: str) -> str:
    """The word without its sweep."""
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    return f"{word.partition('=')[0]}={next(iter(override.sweep_string_iterator()))}"


# test_config.py has a quicker look at the words of the others.
@pytest.mark.parametrize(
    "name", [name if name in EXPERIMENTS else pytest.param(name, marks=pytest.mark.slow) for name in OPENINGS]
)
def test_the_command_that_a_yaml_opens_with_goes_together(name):
    program, *words = OPENINGS[name]
    words = [of_first_job(word) for word in words if word != "-m"]
    config = composed(*words, name="pretrain" if program == "delta-pretrain" else "config")
    if not any("experiment=" in word for word in words):  # their sweeps, which set more, are planned by test_plan.py
        check_choices(config, config.reg.build().stages())


def test_commands_are_found():
    assert {"README.md", "index.md", "first_run.md", "own_images.md"} <= {c.page for c in COMMANDS}
    assert any({"delta-run", "hydra.launcher.timeout_min=240", "seed=range(5)"} <= {*c.words} for c in COMMANDS)
    assert not any("#" in c.words for c in COMMANDS)


@pytest.mark.parametrize("unknown", ["rm -r results", "delta-runs reg=l2", "delta-report results | less"])
def test_a_command_without_a_rule_is_noticed(unknown, monkeypatch):
    assert status(unknown.split(), monkeypatch) is None


# --- Python ---

# So that the blocks need no network, and little time.
SMALLER = {
    'weights="IMAGENET1K_V1"': "weights=None",
    "(224, 224)": "(32, 32)",
    "batch_size=32": "batch_size=10",
    'backbone="resnet50", method="delta", settings={': 'backbone="small_resnet", method="delta", settings={**SMALL, ',
    "DELTA(alpha=0.01, beta=0.01)": "DELTA(alpha=0.01, beta=0.01, attention=AttentionConfig(images=4, head_epochs=1))",
    'AttentionConfig(method="taylor")': 'AttentionConfig(method="taylor", images=4, head_epochs=1)',
}
PYTHON = [(page, first, text) for page in PAGES for first, _, text in blocks(page, "python")]
# What a fragment of the README takes for given.
GIVEN = """
import torch, torchvision
from delta_transfer import AttentionConfig
import torch.nn.functional as F
model = torchvision.models.resnet18()
images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
batches = [(images, labels)]
"""


@pytest.mark.parametrize(("page", "first", "text"), PYTHON, ids=[f"{page.name}:{first}" for page, first, _ in PYTHON])
def test_python_of_the_documentation_works(page, first, text, tmp_path, monkeypatch):
    write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    for said, smaller in SMALLER.items():
        text = text.replace(said, smaller)
    numbers = {key: int(value) for key, value in (SMALL | FEW).items() if value.isdecimal()}
    taps = {"backbone.weights": "none", "backbone.taps": ["layer1.1.conv2"]}
    names = {"__name__": "documentation", "SMALL": numbers | taps}
    if page.name == "README.md":
        exec(GIVEN, names)
    exec(compile("\n" * (first - 1) + text, str(page), "exec"), names)
