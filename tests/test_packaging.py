"""The wheel, installed into a clean environment, holds everything and runs from any working directory.

Offline: the wheel is built with the setuptools at hand, and the clean environment borrows the dependencies
of the one that runs the tests, through a .pth file. Such a file adds directories without processing the .pth
files inside them, so an editable install of this package stays invisible there.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN, EXE = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")


def run(*command, cwd):
    """Run to the end without inheriting import paths; a failure shows what the command printed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build directory of the checkout leaks into it, nor is one left there."""
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("src", "conf"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
        "--disable-pip-version-check", "-w", tmp, source, cwd=tmp)  # fmt: skip
    (built,) = tmp.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """A virtual environment that holds the wheel alone and sees the running one's dependencies."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, with_pip=False)
    python = home / BIN / f"python{EXE}"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
        "--disable-pip-version-check", wheel, cwd=home)  # fmt: skip
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(python, "-c", code, cwd=home).strip())
    borrowed = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return home


FIND = """
import json, delta_transfer, delta_transfer.conf
from importlib.metadata import entry_points
from importlib.resources import files, as_file
with as_file(files("delta_transfer.conf")) as conf:
    choices = [path.relative_to(conf).as_posix() for path in conf.rglob("*.yaml")]
ours = [entry for entry in entry_points(group="console_scripts") if entry.name.startswith("delta-")]
places = [delta_transfer.__file__, delta_transfer.conf.__file__]
scripts = sorted(entry.name for entry in ours if callable(entry.load()))
print(json.dumps({"places": places, "choices": choices, "scripts": scripts}))
"""


@pytest.fixture(scope="module")
def found(clean, tmp_path_factory):
    """What the wheel's own Python finds, in a folder that has nothing of it."""
    return json.loads(run(clean / BIN / f"python{EXE}", "-c", FIND, cwd=tmp_path_factory.mktemp("elsewhere")))


def test_wheel_holds_every_source_file(wheel):
    expected = {
        (Path(prefix) / path.relative_to(ROOT / folder)).as_posix()
        for folder, prefix in (("src/delta_transfer", "delta_transfer"), ("conf", "delta_transfer/conf"))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in path.parts[-3:])
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected, "add the subpackage or the file pattern to [tool.setuptools] in pyproject.toml"


def test_clean_environment_imports_the_wheel(clean, found):
    assert all(Path(place).is_relative_to(clean) for place in found["places"])


def test_every_choice_is_installed(found):
    expected = {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert "config.yaml" in expected
    assert set(found["choices"]) == expected


def test_console_scripts_are_importable(clean, found):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert all((clean / BIN / f"{name}{EXE}").exists() for name in scripts)
    assert found["scripts"] == sorted(scripts)


def test_delta_run_composes_anywhere(clean, tmp_path):
    command = ("dataset=cub", "backbone=small_resnet", "reg=l2", "--cfg", "job")
    assert "name: small_resnet" in run(clean / BIN / f"delta-run{EXE}", *command, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
