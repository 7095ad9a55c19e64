"""What a method computes before training: interrupted, it goes on where it was."""

import re
from itertools import product

import numpy as np
import pytest
import torch

from delta_transfer.data.loader import BatchSource, Passes
from delta_transfer.experiment import fitting
from delta_transfer.experiment.fitting import KeptOnDisk, fit_or_reuse
from delta_transfer.methods.co_tuning import CoTuning
from delta_transfer.methods.delta import DELTA
from delta_transfer.methods.l2_sp_fisher import L2SPFisher
from delta_transfer.methods.lp_ft import LPFT
from delta_transfer.methods.unfinished import Unfinished
from delta_transfer.records.run_directory import RunDirectory

OPTIONS = {"images": 7, "head_epochs": 3, "head_lr": 0.5, "forward_images": 2}  # 3 x 3 batches, then 4 chunks of images


class Drawn(BatchSource):
    """Batches of 4 of 10 images, other ones in each pass; `made` has their numbers."""

    batch_size = 4

    def __init__(self) -> None:
        self.made: list[int] = []

    def drawn_batch(self, indices, iteration, stream, seed, share=slice(None), view=0):
        self.made.append(iteration)
        generator = torch.Generator().manual_seed(iteration)
        return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator)


def fitted(tmp_path, tiny_source, **options) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The importances and the batches that were drawn for them."""
    method, drawn = DELTA(attention=OPTIONS | options), Drawn()
    batches = Passes(drawn, np.arange(10), "fit", 0)
    try:
        with RunDirectory(tmp_path / "run") as directory:
            fit_or_reuse(method, tiny_source, batches, 3, {"options": options}, directory, tmp_path)
    finally:
        fitted.drawn = drawn.made
    return method.fitted, drawn.made


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        *product([{}, {"probe_batchnorm": "train"}], [1, 4, 9, 11, 12]),
        *product([{"head_images": 24}], [1, 3, 6, 8]),
    ],
    ids=str,
)
def test_attention_goes_on_where_it_was_interrupted(options, parts, tmp_path, tiny_source, monkeypatch):
    expected, whole = fitted(tmp_path / "whole", tiny_source, **options)
    note, done = KeptOnDisk.note, []

    def interrupted(self, *of):
        note(self, *of)
        done.append(of)
        if len(done) == parts:
            raise KeyboardInterrupt

    monkeypatch.setattr(KeptOnDisk, "seconds", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(KeptOnDisk, "note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fitted(tmp_path / "other", tiny_source, **options)
    before = fitted.drawn
    found, after = fitted(tmp_path / "other", tiny_source, **options)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    of_probe = 6 if "head_images" in options else 9  # batches, in three epochs
    probe = [number for number in before + after if number < of_probe]
    assert probe == list(range(of_probe))  # nothing is trained on twice
    assert sorted({*before, *after}) == sorted({*whole})
    assert sorted(path.name for path in (tmp_path / "other" / "fitted").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole" / "fitted").iterdir()
    )


@pytest.mark.parametrize("images_at_once", [1, 3])
def test_chunks_of_another_size_go_on_where_others_ended(images_at_once, tmp_path, tiny_source, monkeypatch):
    """As after a change of the number of threads: no image counts twice, and none is left out."""
    expected, _ = fitted(tmp_path / "whole", tiny_source)
    note = KeptOnDisk.note

    def interrupted(self, what, done, *of):
        note(self, what, done, *of)
        if (what, done) == ("removing channels, image", 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(KeptOnDisk, "seconds", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(KeptOnDisk, "note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fitted(tmp_path / "other", tiny_source)
    monkeypatch.setitem(OPTIONS, "forward_images", images_at_once)
    method = DELTA(attention=OPTIONS)
    with RunDirectory(tmp_path / "run") as directory:  # the record names the options of before: it is the same probe
        before = {"options": {}}
        fit_or_reuse(
            method, tiny_source, Passes(Drawn(), np.arange(10), "fit", 0), 3, before, directory, tmp_path / "other"
        )
    for name, value in method.fitted.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_a_long_computation_says_how_far_it_is(tmp_path, tiny_source, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(fitting.time, "monotonic", lambda: next(clock))
    fitted(tmp_path, tiny_source)
    output = capsys.readouterr().out
    assert "batch 9/9" in output and "image 7/7" in output
    where = re.findall(r"image (\d)/7  channel (\d+) of (\w+)", output)  # also while the first images are at work
    assert {(int(image), tap) for image, _, tap in where} >= {(0, "conv1"), (0, "conv2"), (2, "conv1"), (2, "conv2")}
    assert len({channel for image, channel, tap in where if (image, tap) == ("0", "conv2")}) > 1


def test_a_damaged_file_of_what_was_done_is_named_and_not_used(tmp_path, tiny_source, capsys):
    expected, _ = fitted(tmp_path / "whole", tiny_source)
    (result,) = (tmp_path / "whole" / "fitted").glob("*.safetensors")
    folder = tmp_path / "other" / "fitted"
    folder.mkdir(parents=True)
    (folder / result.name).with_suffix(".unfinished").write_bytes(b"damaged")
    found, _ = fitted(tmp_path / "other", tiny_source)
    assert ".unfinished cannot be used" in capsys.readouterr().out
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class Counted(list):
    """Batches that know how many inputs they have."""

    inputs = 10


class Shown(Unfinished):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def show(self, what: str, done: int, total: int, within: str = "") -> None:
        self.seen.append((what, done, total))


@pytest.mark.parametrize(
    ("method", "seen"),
    [
        (CoTuning(), [("of the classes, image", n, 10) for n in (4, 8, 10)]),
        (
            LPFT(probe={"choices": 2}),
            [
                *(("the source's features, image", n, 10) for n in (4, 8, 10)),
                *(("choosing c, value", n, 2) for n in (1, 2)),
            ],
        ),
        (L2SPFisher(fisher={"images": 3}), [("gradients, image", n, 3) for n in (1, 2, 3)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_long_fit_shows_how_far_it_is(method, seen, tiny_source):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10) % 3
    images = torch.randn(10, 3, 8, 8, generator=generator)
    method.unfinished = shown = Shown()
    with torch.set_grad_enabled(isinstance(method, L2SPFisher)):
        method.fit(tiny_source, Counted(zip(images.split(4), labels.split(4), strict=True)), 3)
    assert shown.seen == seen
