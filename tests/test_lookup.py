"""Finished runs of a sweep are found by their records: nothing is launched, and no image is looked at, for them."""

import os
import shutil
from pathlib import Path

import cloudpickle
import pytest
from hydra.core.plugins import Plugins
from PIL import Image

from delta_transfer import data
from delta_transfer.experiment.lookup import Lookup

from .miniature import composed, delta_run, tiny_overrides, write_cub


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Words of a sweep, with two finished runs."""
    folder = tmp_path_factory.mktemp("sweep")
    words = ["-m", *tiny_overrides(write_cub(folder / "CUB"), folder / "results"), "split.val_fraction=0.2"]
    with pytest.MonkeyPatch.context() as patch:
        assert delta_run(patch, *words, "reg=l2,l2_sp") == 0
    return folder, words


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The words of the jobs that were launched, without those that all have."""
    jobs = []
    # Not the imported class: a test of joblib makes Hydra's list of plugins anew, with classes of their own.
    launcher = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"]
    launch = launcher.launch

    def noted(self, job_overrides, initial_job_idx):
        jobs.extend(job_overrides)
        return launch(self, job_overrides, initial_job_idx)

    monkeypatch.setattr(launcher, "launch", noted)
    return jobs


def copied(made, tmp_path: Path) -> list[str]:
    """The words of the sweep on copies of its data and its results."""
    folder, words = made
    shutil.copytree(folder, tmp_path / "copy")
    return [word.replace(str(folder), str(tmp_path / "copy")) for word in words]


def test_only_what_is_not_finished_is_launched(made, tmp_path, monkeypatch, capsys, launched):
    words = copied(made, tmp_path)
    reads = []
    load = data.load_dataset
    monkeypatch.setattr(data, "load_dataset", lambda *of: reads.append(of) or load(*of))
    assert delta_run(monkeypatch, *words, "reg=l2,l2_sp") == 0
    output = capsys.readouterr().out
    assert not launched and len(reads) == 1 and output.count("done, skipped") == 2
    assert delta_run(monkeypatch, *words, "reg=l2,delta_noatt,l2_sp") == 0
    assert [[word for word in job if word.startswith("reg=")] for job in launched] == [["reg=delta_noatt"]]
    assert "run 3 of 3" not in output


def test_a_sweep_reads_a_data_set_once(made, tmp_path, monkeypatch):
    reads = []
    load = data.load_dataset
    monkeypatch.setattr(data, "load_dataset", lambda *of: reads.append(of) or load(*of))
    words = copied(made, tmp_path)
    # The runs with reg=l2 are finished: the command looks at the data set for them before it starts the others.
    assert delta_run(monkeypatch, *words, "reg=l2,delta_noatt", "dataset.subset_seed=0,1") == 0
    assert len(reads) == len({repr(of) for of in reads}) == 2
    assert delta_run(monkeypatch, *words, "reg=l2,l2_fe") == 0  # the files may have changed meanwhile
    assert len(reads) == 3


def test_a_worker_reads_a_data_set_once(made, tmp_path, monkeypatch):
    """Launchers send the job to their workers as a copy, and a worker gets one copy for each of its runs."""
    reads = []
    load = data.load_dataset
    monkeypatch.setattr(data, "load_dataset", lambda *of: reads.append(of) or load(*of))
    launcher = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"]
    launch = launcher.launch

    def with_copies(self, job_overrides, initial_job_idx):
        made = []
        for index, words in enumerate(job_overrides, initial_job_idx):
            self.task_function = cloudpickle.loads(cloudpickle.dumps(self.task_function))
            made += launch(self, [words], index)
        return made

    monkeypatch.setattr(launcher, "launch", with_copies)
    words = copied(made, tmp_path)
    for count in (1, 2):
        assert delta_run(monkeypatch, *words, "reg=l2_fe,delta_noatt", f"seed={count}") == 0
        assert len(reads) == count


def test_names_are_those_that_runs_give_themselves(made):
    folder, words = made
    config = composed(*words[1:], "reg=l2")
    found = Lookup().find(config)
    assert found.directory is not None and (found.directory.path / "summary.json").exists()
    assert config.precision == "fp32" and len(found.splits.val)


@pytest.mark.parametrize("what", ["an image", "its predictions", "its record", "a further measurement"])
def test_what_changed_or_is_asked_beside_it_is_for_the_run_to_see(what, made, tmp_path, monkeypatch, launched):
    words = [*copied(made, tmp_path), "reg=l2"]
    (run,) = (tmp_path / "copy").glob("results/runs/*-l2-*")
    if what == "an image":  # another data set: another run
        image = next((tmp_path / "copy").glob("CUB/images/*/*.jpg"))
        Image.open(image).rotate(90).save(image)
    elif what == "its predictions":
        (run / "predictions.npz").write_bytes(b"damaged")
        later = (run / "summary.json").stat().st_mtime + 1
        os.utime(run / "predictions.npz", (later, later))
    elif what == "its record":
        (run / "summary.json").write_text("{}")
    else:
        words.append("evaluate.forgetting=true")
    status = delta_run(monkeypatch, *words)
    assert len(launched) == 1 and status == (0 if what == "an image" else 1)
