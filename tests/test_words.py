"""What people type: keys and values that do not exist, options anywhere, paths with any characters, mixed sweeps."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import delta_transfer
from delta_transfer.cli import data, export, predict, run
from delta_transfer.cli.compose import UsageError, compose_config, for_hydra, parsed, repeated, split_options
from delta_transfer.cli.explain import nearest, unknown_choice
from delta_transfer.cli.run import Outcome, look_again, next_steps, note_finished, table
from delta_transfer.cli.sweep import first_values, for_sweep, values_of
from delta_transfer.common.console import quoted
from delta_transfer.common.errors import UserError
from delta_transfer.common.options import OptionError
from delta_transfer.experiment.lookup import Lookup
from delta_transfer.records.locks import InUse
from delta_transfer.records.run_directory import RunResult
from delta_transfer.report import main as report
from delta_transfer.report import next_step

from .miniature import delta_run, tiny_overrides, write_cub

FOREIGN = ("hydra", "omegaconf", "structured://", "Lexer", "mismatched", "append", "Traceback", "full_key")


@pytest.fixture(scope="module")
def cub_root(tmp_path_factory) -> Path:
    return write_cub(tmp_path_factory.mktemp("data") / "CUB_200_2011")


# ---- keys and choices ----------------------------------------------------------------------------------------

# Words of one job, the key that is refused, and what the message names instead.
REFUSED = {
    "reg.alhpa=0.1": ("reg.alhpa", "reg.alpha"),
    "+reg.alhpa=0.1": ("reg.alhpa", "reg.alpha"),
    "++reg.alhpa=0.1": ("reg.alhpa", "reg.alpha"),
    "~reg.alhpa": ("reg.alhpa", "reg.alpha"),
    "~reg.alpha": ("reg.alpha", ""),
    "+reg.bta=1": ("reg.bta", "reg.beta"),  # of another method than the default
    "+lr=0.1": ("lr", "schedule.lr"),
    "+hydra.job.nmae=x": ("hydra.job.nmae", "hydra.job.name"),
    "reg=dleta": ("reg", "delta"),
    "+reg=dleta": ("reg", "delta"),
    "experiment=demoo": ("experiment", "demo"),
    "experiment/values=dogs_dleta": ("experiment/values", "dogs_delta"),
    "reg=[lwf,at]": ("reg", "+reg@reg.terms.lwf=lwf"),
    "reg.scope=conv": ("reg.scope", "l2_sp"),  # of another method
    "reg.alpha=much": ("reg.alpha", "number"),
    "seed=1.5": ("seed", "whole number"),
    "backbone.taps=fc": ("backbone.taps", "'backbone.taps=[fc]'"),
    "reg.attention=3": ("reg.attention", "reg.attention.images"),
    "reg=l2,delta": ("reg", "-m"),
    "seed=${nothing}": ("seed", ""),
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_no_schema_has_is_refused_with_the_nearest(word):
    key, instead = REFUSED[word]
    with pytest.raises(OptionError) as refused:
        compose_config("config", [word])
    message = str(refused.value)
    assert refused.value.key == key and instead in message and message.count("\n") <= 3
    assert not [foreign for foreign in FOREIGN if foreign in message.replace(key, "").replace(instead, "")]


@pytest.mark.parametrize("name", ["config", "pretrain"])
def test_every_way_to_run_refuses_them(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["+foo=1"], ["-m", "seed=0,1", "+foo=1"], ["--cfg", "job", "+foo=1"], ["-m", "reg=l2,dleta"]):
        monkeypatch.setattr(sys, "argv", ["delta-run", *words])
        with pytest.raises(SystemExit) as stop:
            run.main(name)
        assert stop.value.code == 1
        output = capsys.readouterr()
        assert ("foo" in output.err or "delta" in output.err) and not list(tmp_path.rglob("runs"))
        assert not [foreign for foreign in FOREIGN if foreign in output.err]


def test_delta_data_refuses_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["verify", "folder", "dataset.root=x", "+foo=1"], ["list", "data_dr=x"], ["verify", "foldr"]):
        assert data.main(arguments) == 1
        assert not [foreign for foreign in FOREIGN if foreign in capsys.readouterr().err]


def test_plus_before_a_known_key_changes_nothing():
    assert compose_config("config", ["++reg.alpha=0.5", "+reg=l2_sp"]).reg.alpha == 0.5
    assert for_hydra(["experiment=demo"], True) == ["+experiment=demo"]


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("lr", ["seed", "schedule.lr"], "schedule.lr"),
        ("sdg", ["adamw", "sgd"], "sgd"),
        ("L2", ["afa", "l2"], "l2"),
        ("nothing", ["l2", "afa"], None),
    ],
)
def test_nearest(word, known, near):
    assert nearest(word, known) == near


# ---- words and options ---------------------------------------------------------------------------------------

SHAPES = {
    ("reg=l2,", "delta"): "reg=l2,delta",
    ("reg", "=", "delta"): "reg=delta",
    ("reg", "=delta"): "reg=delta",
    ("dataset.root=",): "dataset.root=",
    ("split.fold=rnage(3)",): "range",
    ("split.folds=(3",): "split.folds",
    ("=3",): "=3",
    ("photos",): "photos",
    ("folder",): "dataset=folder",
    ("delta",): "reg=delta",
}


def test_a_key_with_two_values_is_named():
    assert not list(repeated(["seed=0", "reg=l2", "+seed=0", "~reg"]))
    (line,) = repeated(["seed=0", "reg=l2", "++seed=1"])
    assert "seed=1" in line


def test_a_folder_as_the_data_set_is_answered_with_the_words_to_type(tmp_path):
    (tmp_path / "my photos").mkdir()
    words = unknown_choice("dataset", str(tmp_path / "my photos"), ["cub"])
    assert f"dataset=folder 'dataset.root={tmp_path / 'my photos'}'" in str(words)


def test_an_option_without_a_value_takes_none():
    with pytest.raises(UsageError, match="--multirun"):
        split_options(["--multirun=true"])


@pytest.mark.parametrize("words", SHAPES)
def test_a_word_of_another_shape_is_answered_with_the_one_to_type(words):
    with pytest.raises(UserError) as refused:
        for_hydra(words, False)
    assert SHAPES[words] in str(refused.value)


def test_options_stand_anywhere():
    options, words = split_options(
        ["reg=l2", "-m", "seed=0,1", "--cfg", "job", "x=1", "--config-dir=mine", "--info", "y=2"]
    )
    assert options == ["-m", "--cfg", "job", "--config-dir=mine", "--info"]
    assert words == ["reg=l2", "seed=0,1", "x=1", "y=2"]
    assert first_values(["seed=range(2,4)", "reg=l2,delta", "a=[1,2]"]) == ["seed=2", "reg=l2", "a=[1,2]"]


@pytest.mark.parametrize("folder", ["été", "Mes photos été", "it's 图", "plain", "a b"])
def test_a_sweep_keeps_each_letter_of_a_folder(folder):
    (word,) = for_sweep(for_hydra([f"dataset.root={folder}"], True))
    (value,) = values_of(parsed(word))
    assert parsed(f"dataset.root={value}").value() == folder


@pytest.mark.parametrize("arguments", [["--helpp"], ["--cfg"], ["--cfg", "jo"], ["-x"]])
def test_unknown_options_have_exit_status_2(arguments, monkeypatch, capsys):
    with pytest.raises(UsageError):
        split_options(arguments)
    assert delta_run(monkeypatch, *arguments) == 2


@pytest.mark.parametrize("main", [export.main, report])
def test_commands_without_settings_refuse_one(main, capsys):
    run = ["RUN", "--format", "onnx"] if main is export.main else ["RUN"]
    assert main([*run, "+reg.alhpa=1"]) == 1
    assert "+reg.alhpa=1" in capsys.readouterr().err


def test_an_error_of_the_system_names_the_file_and_no_number(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert data.main(["prepare", "glyphs", f"results_dir={tmp_path / 'file' / 'x'}"]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "file") in said and "Errno" not in said


@pytest.mark.parametrize("words", [[predict.main, "RUN", ""], [report, ""], [data.main, "verify", "folder", " "]])
def test_an_empty_word_is_no_folder(words, capsys):
    main, *arguments = words
    assert main(arguments) == 1
    assert "empty" in capsys.readouterr().err


def test_every_command_says_its_version(monkeypatch, capsys):
    assert delta_run(monkeypatch, "reg=l2", "--version") == 0
    of_data = [(data.main, name) for name in ("list", "verify", "doctor", "taps", "prepare")]
    of_report = [(report, name) for name in ("attention", "case-study", "trust", "publish")]
    commands = [(data.main,), (export.main,), (predict.main,), (report,), *of_data, *of_report]
    for main, *subcommand in commands:
        with pytest.raises(SystemExit) as stop:
            main([*subcommand, "--version"])
        assert not stop.value.code
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + len(commands) and all(line.split()[-1] == delta_transfer.__version__ for line in said)


# ---- free text -----------------------------------------------------------------------------------------------

UGLY = [
    "photos (1)",
    "x=1",
    "é日本",
    "[b]",
    "{a: 1}",
    "a&b",
    "#x",
    "~x",
    "$HOME",
    "it's",
    'say "hi"',
    "a\\b",
    "a\\'b\\",
]
UGLY += ["${x}", "\\${x}", " a ", "007", "1e3", "true", "nan", "a:b", "*", "a\nb", "'q'", "%", "range(3)", "a,b", "x@y"]


@pytest.mark.parametrize("several", [False, True])
def test_a_path_is_what_the_shell_passes(several, tmp_path, monkeypatch):
    """An existing path is taken letter by letter, even in a sweep, where commas separate values."""
    monkeypatch.chdir(tmp_path)
    for text in UGLY:
        Path(text).mkdir()
        (word,) = for_hydra([f"dataset.root={text}"], several)
        override = parsed(word)
        assert not override.is_sweep_override() and override.value().replace("\\${", "${").lstrip("\\") == text.lstrip(
            "\\"
        )
        assert for_hydra([word], several) == [word]  # words of a record, once more
        (shell,) = shlex.split(quoted(text))
        assert shell == text
    root, results = "a\\'b\\${x}, (1)", "é ${y}"
    Path(root).mkdir()
    Path(results).mkdir()
    config = compose_config("config", ["dataset=folder", f"dataset.root={root}", f"results_dir={results}"])
    assert (config.dataset.root, config.results_dir, config.cache_dir) == (root, results, f"{results}/cache")


def test_a_home_folder_a_comma_and_a_reference(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert for_hydra(["data_dir=~/photos"], False) == ["data_dir=/h/photos"]
    assert for_hydra(["backbone.weights=none, V (1)"], True) == ["backbone.weights=none,'V (1)'"]
    assert parsed(for_hydra(["backbone.weights=a,b"], False)[0]).value() == "a,b"
    assert for_hydra(["dataset.root=null"], False) == ["dataset.root=null"]
    assert compose_config("config", ["data_dir=d", "results_dir=${data_dir}/r s"]).results_dir == "d/r s"
    assert compose_config("config", ["backbone.taps=[a (b),c]"]).backbone.taps == ["a (b)", "c"]


# ---- sweeps --------------------------------------------------------------------------------------------------


def test_a_methods_key_goes_to_the_methods_that_have_it(cub_root, tmp_path, monkeypatch, capsys):
    tiny = [*tiny_overrides(cub_root, tmp_path / "it's (1)"), "schedule.iterations=1"]
    command = [*tiny, "reg=l2,l2_sp", "reg.alpha=0.1,0.2", "reg.scope=conv", "-m"]
    assert delta_run(monkeypatch, *command) == 0
    output = capsys.readouterr().out
    runs = [json.loads(path.read_text())["config"]["reg"] for path in tmp_path.rglob("summary.json")]
    assert sorted((reg["name"], reg.get("alpha"), reg.get("scope")) for reg in runs if reg["name"] != "l2") == [
        ("l2_sp", 0.1, "conv"),
        ("l2_sp", 0.2, "conv"),
    ]
    assert len(runs) == 3 and "reg.scope" in output and "reg.alpha" in output
    last = shlex.split(output.splitlines()[-1])
    assert last[-2:] == ["delta-report", str(tmp_path / "it's (1)")]


def test_a_value_that_is_refused_is_found_before_anything_runs(cub_root, tmp_path, monkeypatch, capsys):
    tiny = tiny_overrides(cub_root, tmp_path)
    for words in (["reg=l2_sp", "reg.alpha=0.1,-1"], ["seed=0,1.5"], ["reg=l2,l2_sp", "reg.alhpa=1"]):
        assert delta_run(monkeypatch, "-m", *tiny, *words) == 1
        assert "error" in capsys.readouterr().err and not list(tmp_path.rglob("runs"))
    for word in ("seed=range(3,1)", "seed=range(1,2,0)", "reg=glob(zz*)", "schedule.lr=glob(*)"):
        assert delta_run(monkeypatch, "-m", *tiny, word) == 1
        assert word in capsys.readouterr().err and not list(tmp_path.rglob("runs"))


def test_a_dry_run_ends_with_the_command_that_runs(cub_root, tmp_path, monkeypatch, capsys):
    words = [*tiny_overrides(cub_root, tmp_path), "reg=l2"]
    assert delta_run(monkeypatch, *words, "dry_run=true") == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[1:] == ["delta-run", *words]


# ---- two shells on one sweep ---------------------------------------------------------------------------------


def outcome(monkeypatch, state: str) -> Outcome:
    monkeypatch.setattr(Outcome, "of_this_command", [])
    made = Outcome(["seed=0"], SimpleNamespace(results_dir="r s", split=SimpleNamespace(folds=None)), True)
    made.state = state
    return made


def test_the_table_of_a_sweep_has_no_empty_column(monkeypatch):
    stopped, done = outcome(monkeypatch, "stopped"), outcome(monkeypatch, "done")
    assert table([stopped, done]).header == ["state", "runs"]
    stopped.overrides = ["seed=1"]
    assert table([stopped, done]).header == ["state", "runs", "which"]
    stopped.reason = "no space"
    assert table([stopped, done]).header == ["state", "runs", "which", "reason"]


def test_a_command_that_is_stopped_knows_the_runs_that_another_finished(cub_root, tmp_path, monkeypatch, capsys):
    words = [*tiny_overrides(cub_root, tmp_path), "reg=l2", "seed=0"]
    assert delta_run(monkeypatch, "-m", *words) == 0
    (one,) = Outcome.of_this_command
    assert one.state == "done"
    one.state, one.record = "in progress", None
    note_finished([one], {})
    assert one.state == "skipped" and "test_top1" in one.record


def test_a_run_that_another_shell_finished_meanwhile_is_not_in_work(monkeypatch):
    one = outcome(monkeypatch, "in progress")
    monkeypatch.setattr(Lookup, "finished", lambda *_: None)
    monkeypatch.setattr(run, "run", lambda *_: RunResult({"test_top1": 1.0}, skipped=True))
    look_again([one], {})
    assert one.state == "skipped" and one.record == {"test_top1": 1.0}
    assert next_steps([one], "delta-run x") == ["Next: delta-report 'r s'"]


def test_a_report_on_a_terminal_ends_with_a_command(monkeypatch, tmp_path):
    args = SimpleNamespace(dirs=[tmp_path / "r s", tmp_path / "gone"], select=None)
    args.dirs[0].mkdir()
    assert shlex.split(next_step(args))[:2] == ["delta-report", str(args.dirs[0])]
    args.select = "cv"
    assert shlex.split(next_step(args))[2:] == ["--select", "cv", "--emit-overrides"]


def test_a_dry_run_that_fails_has_no_next_command(monkeypatch, tmp_path, capsys):
    words = ["dataset=folder", f"dataset.root={tmp_path}", "dry_run=true", f"results_dir={tmp_path}"]
    assert delta_run(monkeypatch, *words) == 1
    assert "Next: " not in capsys.readouterr().out


def test_a_run_that_is_still_in_work_asks_for_the_same_command(monkeypatch):
    one = outcome(monkeypatch, "in progress")

    def busy(*_):
        raise InUse("x")

    monkeypatch.setattr(run, "run", busy)
    monkeypatch.setattr(Lookup, "finished", lambda *_: None)
    look_again([one], {})
    (line,) = next_steps([one], "delta-run x")
    assert one.state == "in progress" and line.endswith(": delta-run x")


# ---- pipes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"]])
def test_a_closed_pipe_ends_quietly(words):
    reader, writer = os.pipe()
    os.close(reader)
    code = "from delta_transfer.train import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_a_pipe_that_closes_in_a_run_ends_it_quietly(mode, tmp_path, monkeypatch, capsys):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(run, "run", closed)
    assert delta_run(monkeypatch, *mode, "reg=l2", f"results_dir={tmp_path}") == 141
    assert capsys.readouterr().err == ""
