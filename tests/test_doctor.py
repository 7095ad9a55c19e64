"""delta-data doctor: what it finds, what it says to do, and when it says that delta-run cannot work."""

import shlex
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from safetensors.torch import save_file

from delta_transfer.cli import doctor
from delta_transfer.cli.compose import compose_dataset as composed
from delta_transfer.cli.data import main
from delta_transfer.cli.doctor import Findings
from delta_transfer.common import cores
from delta_transfer.data import examination
from delta_transfer.engine.devices import threads_in_words
from delta_transfer.models.zoo import build_source

from .miniature import write_cub
from .trees import write_folder

CHOICES = {
    "dataset": ["cifar10", "cub", "dogs", "folder", "glyphs"],
    "backbone": ["resnet18", "resnet50", "small_resnet"],
}


@pytest.fixture(autouse=True)
def few_choices(monkeypatch) -> None:
    """Composing every file of conf/ takes a while; tests/test_config.py does that."""
    monkeypatch.setattr("delta_transfer.cli.sources.choices", CHOICES.get)


@pytest.fixture
def found(tmp_path, monkeypatch) -> Findings:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return Findings()


def without(monkeypatch, name: str) -> None:
    def installed(package: str) -> str:
        if package == name:
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(doctor, "version", installed)


def lines_of(found):
    return [f"{state.text:8} {what.text:10} {words.text}" for state, what, words in found.rows]


def test_everything_is_looked_at(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    photos = write_folder(tmp_path / "photos", **{"ants": 5, "bees": 5})
    status = main(["doctor", f"dataset.root={photos}", f"data_dir={tmp_path}", f"results_dir={tmp_path / 'results'}"])
    out = capsys.readouterr().out
    out = " ".join(out.split())
    assert status == 0 and "delta-run can work here" in out and "TROUBLE" not in out
    assert f"torch {version('torch')}" in out and threads_in_words() in out
    assert f"ready: 2 classes, 8 training and 2 test images, {photos}" in out
    assert "cub" not in out and "GPU" in out and "memory" in out  # no word about other data sets than the folder
    assert "results_dir=" in out and "cache_dir=" in out
    assert "resnet50: delta-run downloads them into" in out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("of_a_person", "taken"), [(None, 2), ("8", 8)])
def test_threads_are_those_that_a_run_takes_in_a_container(of_a_person, taken, found, monkeypatch):
    threads = [8]
    monkeypatch.setattr(cores, "USABLE", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if of_a_person:
        monkeypatch.setenv("OMP_NUM_THREADS", of_a_person)
    doctor.torch_and_devices(found)
    assert any(f"2 cores, {taken} threads" in line for line in lines_of(found))


def test_the_next_command_compares_methods_on_the_folder_that_was_named(tmp_path):
    words = [f"dataset.root={tmp_path / 'my photos'}", "dataset.test_fraction=0.3"]
    _, _, command = doctor.next_step(composed("folder", words), words).partition("delta-run ")
    assert shlex.split(command) == ["+experiment=which_is_best", *words, "budget=45m"]
    for other in ([], ["dataset=glyphs"], ["dataset=cub", f"dataset.root={tmp_path}"]):
        assert "which_is_best" not in doctor.next_step(composed("folder", other), other)


def test_images_that_did_not_change_are_decoded_once(tmp_path, found, monkeypatch):
    photos = write_folder(tmp_path / "photos", **{"ants": 5, "bees": 5})
    (photos / "ants" / "cut_off.png").write_bytes(b"")
    decoded: list[int] = []
    examine = examination.examine
    monkeypatch.setattr(examination, "examine", lambda *of: decoded.append(len(of[0].labels)) or examine(*of))
    config = composed("folder", [f"dataset.root={photos}"]).dataset
    cache = tmp_path / "cache"

    def looked() -> list[str]:
        found.rows.clear()
        doctor.images(found, config, cache)
        return lines_of(found)

    assert looked() == looked() and decoded == [11, 11] and not cache.exists()  # it makes no folder
    cache.mkdir()
    first = looked()
    assert looked() == first and decoded == [11, 11, 11] and any("cut_off.png" in line for line in first)
    (photos / "ants" / "cut_off.png").unlink()
    assert looked() != first and decoded[3:] == [10]


def test_a_missing_extra_is_no_trouble(found, monkeypatch):
    without(monkeypatch, "tensorboard")
    doctor.packages(found)
    (line,) = [line for line in lines_of(found) if "tensorboard is not installed" in line]
    assert line.startswith("optional") and "pip install 'delta-transfer[tensorboard]'" in line
    assert found.troubles == 0


def test_a_missing_package_is(found, monkeypatch):
    without(monkeypatch, "safetensors")
    doctor.packages(found)
    assert found.troubles == 1 and any("safetensors is not installed: pip install" in line for line in lines_of(found))


def test_a_package_that_is_too_old_is_named(found, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "1.0" if name == "torch" else version(name))
    doctor.packages(found)
    assert found.troubles == 1 and any("torch 1.0 is not torch>=2" in line for line in lines_of(found))


def test_a_broken_torch_is_a_finding_and_no_stack_trace(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with found.looking_at("torch"):
        doctor.torch_and_devices(found)
    assert found.troubles == 1 and "torchvision" in lines_of(found)[-1]


def test_folders_that_cannot_be_written_are_a_trouble(found, tmp_path):
    (tmp_path / "file").touch()
    doctor.disk(
        found, composed("folder", [f"results_dir={tmp_path / 'file' / 'results'}", f"cache_dir={tmp_path / 'cache'}"])
    )
    assert found.troubles == 1 and "cannot be written: set results_dir=DIR" in lines_of(found)[0]


def test_little_memory_and_a_full_disk_are_named(found, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ENOUGH_MEMORY", 2**60)
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 2**60)
    doctor.memory(found)
    doctor.disk(found, composed("folder", [f"results_dir={tmp_path}"]))
    assert [line.split()[0] for line in lines_of(found)] == ["missing"] * 3 and "backbone=resnet18" in lines_of(found)[
        0
    ]


def test_weights_are_in_the_cache_or_will_be_downloaded(found, tmp_path):
    doctor.weights(found, ["backbone=resnet18"])
    assert lines_of(found)[-1].startswith("missing") and "set backbone.weights=FILE" in lines_of(found)[-1]
    doctor.weights(found, ["backbone=resnet18", f"backbone.weights={tmp_path / 'none.pth'}"])
    assert found.troubles == 1 and "none.pth" in lines_of(found)[-1]


def test_of_which_network_a_file_of_weights_is(found, tmp_path):
    path = tmp_path / "weights.safetensors"
    small = composed("folder", ["backbone=small_resnet", "backbone.weights=none"]).backbone
    save_file(build_source(small, 0).weights(), path)
    doctor.weights(found, [f"backbone.weights={path}"])
    assert lines_of(found) == [f"ok       weights    {path}: fits backbone=small_resnet"]
    save_file({"weight": torch.zeros(1)}, path)
    doctor.weights(found, [f"backbone.weights={path}"])
    assert found.troubles == 1 and "no network of conf/backbone" in lines_of(found)[-1]
    for problem in (b"nothing", None):
        path.unlink() if problem is None else path.write_bytes(problem)
        with found.looking_at("weights"):
            doctor.weights(found, [f"backbone.weights={path}"])
        assert str(path) in lines_of(found)[-1] and "no network" not in lines_of(found)[-1]
    assert found.troubles == 3


def test_what_is_no_file_is_not_tried_on_networks(found, monkeypatch):
    monkeypatch.setattr("delta_transfer.models.zoo.torchvision_weights", lambda *arguments: pytest.fail("a download"))
    doctor.weights(found, ["backbone.weights=IMAGENET1K_V1"])
    assert "delta-run downloads them into" in lines_of(found)[-1]


@pytest.mark.parametrize(
    ("limit", "left"), [("1000", 450), ("100", 0), ("max", None), (None, None)], ids=["some", "none", "max", "absent"]
)
def test_memory_that_a_container_has_left(limit, left, tmp_path):
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("750\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert doctor.left_to_container(tmp_path) == left


def test_what_to_do_about_absent_data_sets(found, tmp_path):
    doctor.data_sets(found, composed("folder", [f"data_dir={tmp_path}"]), [f"data_dir={tmp_path}"])
    absent = [line for line in lines_of(found) if line.startswith("missing")]
    assert "cifar10" in absent[0] and "dataset.download=true" in absent[0]
    assert "cub, dogs" in absent[1] and "delta-data verify NAME" in absent[1]


def test_a_root_belongs_to_the_data_set_that_is_named(found, tmp_path):
    words = ["dataset=cub", f"dataset.root={tmp_path / 'birds'}"]
    doctor.data_sets(found, composed("cub", words[1:]), words)
    root = write_cub(tmp_path / "birds")
    doctor.data_sets(found, composed("cub", words[1:]), words)
    assert any(f"subset: 3 classes, 18 training and 6 test images, {root}" in line for line in lines_of(found))


def test_a_folder_of_images_that_is_not_there_is_a_trouble(tmp_path, found):
    missing = [f"dataset.root={tmp_path / 'photos'}"]
    doctor.data_sets(found, composed("folder", missing), missing)
    assert found.troubles == 1 and "There is no folder" in lines_of(found)[0]
