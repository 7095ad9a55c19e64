"""Weights in files of other programs: suffixes, prefixes, wrappers, and files that hold something else."""

import argparse
import logging

import pytest
import torch
from safetensors.torch import save_file

from delta_transfer.common.errors import UserError
from delta_transfer.records.weights import SUFFIXES, fitted_names, is_file_name, read_file

from .conftest import TinyNet


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return TinyNet().state_dict()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".safetensors"] + [".pth.tar"])
def test_the_content_decides_how_a_file_is_read(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    assert is_file_name(str(path))
    torch.save(state(), path)
    assert same(read_file(path), state())
    save_file(state(), path)
    assert same(read_file(path), state())
    torch.save(state(), tmp_path / "pickled.safetensors")
    assert same(read_file(tmp_path / "pickled.safetensors"), state())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "state_dict_ema", "ema", "teacher"])
def test_wrappers_are_opened(tmp_path, wrapper):
    options = argparse.Namespace(lr=0.1)  # scripts keep them beside the weights
    torch.save({"epoch": 3, wrapper: state(), "args": options}, tmp_path / "a.ckpt")
    assert same(read_file(tmp_path / "a.ckpt"), state())


def test_plain_weights_are_read_before_their_average_which_is_said(tmp_path, caplog):
    other = {name: value + 1 for name, value in state().items()}
    torch.save({"state_dict_ema": other, "state_dict": state()}, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, "delta_transfer"):
        assert same(read_file(tmp_path / "a.pth"), state())
    assert "state_dict_ema" in caplog.text


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "resnet.", "module.", "_orig_mod.", "module.encoder_q."])
def test_a_common_prefix_is_taken_off_and_said(prefix, caplog):
    given = {prefix + name: value for name, value in state().items()} | {"criterion.weight": torch.ones(1)}
    with caplog.at_level(logging.INFO, "delta_transfer"):
        assert same(fitted_names(given, state(), "x.pth"), state())
    assert prefix in caplog.text and "criterion.weight" in caplog.text  # what is left out is named


def test_names_that_fit_and_names_of_other_networks_stay(caplog):
    strange = {f"a.{name[:3]}": value for name, value in state().items()}
    for given in (state(), state() | {"model.fc.bias": torch.ones(4)}, strange):
        assert fitted_names(given, state(), "x.pth") is given
    assert not caplog.text


def test_two_networks_in_one_file_are_refused():
    given = {prefix + name: value for name, value in state().items() for prefix in ("student.", "teacher.")}
    with pytest.raises(UserError) as told:
        fitted_names(given, state(), "x.pth")
    assert "student." in str(told.value) and "teacher." in str(told.value)


def whole_model(path):
    torch.save(TinyNet(), path)


def cut_off(path):
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-100])


def cut_off_safetensors(path):
    save_file(state(), path)
    path.write_bytes(path.read_bytes()[:-100])


def scripted(path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(path)


def zipped(path):
    import zipfile

    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights.pth", b"...")


WRONG = {
    "whole model": (whole_model, "TinyNet"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><html>Sign in</html>"), "web page"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 9"), "git lfs pull"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "cut off": (cut_off, "its end is missing"),
    "cut off, safetensors": (cut_off_safetensors, "damaged"),
    "program": (scripted, "TorchScript"),
    "archive": (zipped, "archive"),
    "nonsense": (lambda path: path.write_bytes(b"nonsense"), "damaged"),
    "a list": (lambda path: torch.save([1, 2], path), "does not hold a state dict"),
}


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, but files of it are there
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", WRONG)
def test_files_that_hold_something_else_are_named_in_our_words(tmp_path, case, suffix):
    make, cue = WRONG[case]
    path = tmp_path / f"weights{suffix}"
    make(path)
    with pytest.raises(UserError) as told:
        read_file(path)
    message = str(told.value)
    assert str(path) in message and cue in message
    assert not any(foreign in message for foreign in ("weights_only", "\x1b", "\n", "pickle", "PytorchStreamReader"))
