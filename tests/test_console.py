"""The progress line: what has room is whole, and the name of the run is the last to be shown."""

import re
import subprocess
import sys

import pytest

from delta_transfer.common import console
from delta_transfer.common.console import Display, Report, progress_line, shorten_list

REPORT = Report("train 55.2 %  test 51.0 %  812 images/s", ("cross_entropy 1.44", "feature_maps 0.031"))


@pytest.mark.parametrize("width", [50, 80, 100, 140, 200])
@pytest.mark.parametrize("run", ["", "run 3 of 18"])
def test_a_progress_line_never_cuts_a_number(width, run):
    name = "cub-resnet18-delta-s0-0123abcd"
    line = progress_line(width, run, 120, 300, "0:02:10", REPORT, name)
    assert len(line) <= width and "\n" not in line
    assert REPORT.numbers in line and "120/300" in line
    if width >= 80:
        assert run in line and "0:02:10" in line
    if width >= 200:
        assert line.endswith(f"{'  '.join(REPORT.losses)}  {name}")
    for loss in REPORT.losses:
        assert loss in line or loss.split()[0] not in line
    *_, last = line.split("  ")
    shortened = last.removesuffix("…")
    assert name.startswith(shortened) or last in (REPORT.numbers.split("  ")[-1], *REPORT.losses)


def test_the_bar_is_full_at_the_end():
    assert "━" * 12 in progress_line(80, "", 300, 300, "", Report(), "x")
    assert "━" not in progress_line(80, "", 0, 300, "", Report(), "x")


@pytest.mark.parametrize("told", [True, False])
def test_the_time_left_of_a_resumed_task_follows_from_what_was_done_since(told, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    display = Display("decoding", 1000, "image")
    clock[0] = 600.0  # of preparations
    if told:
        display.start_at(500)
    for step in range(501, 1001):
        clock[0] += 2.0
        display.update(step)
    left = {int(a): int(b) for a, b in re.findall(r"image (\d+)/1000 .*?(\d+) s left", capsys.readouterr().out)}
    expected = {step: 2 * (1000 - step) for step in ([501] if told else []) + [600, 700, 800, 900]}
    assert left == expected


def test_a_step_that_takes_minutes_has_lines_within_it(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    display = Display("attention", 64, "image", line_seconds=30)
    for second in range(201):
        clock[0] = float(second)
        display.update(4 * (second // 100), Report(f"at {second}"))
    found = re.findall(r"image (\d+)/64  at (\d+)(?:  (\d+) s left)?", capsys.readouterr().out)
    expected = [("0", str(second), "") for second in (0, 30, 60, 90)]
    expected += [("4", str(second), str(1500 - (second - 100))) for second in (120, 150, 180)]
    assert found == [*expected, ("8", "200", "1400")]


def test_a_closed_pipe_ends_a_command_quietly():
    code = "import sys; from delta_transfer.common.console import stoppable; "
    code += "sys.exit(stoppable(lambda: [print('x' * 99) for _ in range(9999)] and 0)())"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


@pytest.mark.parametrize(("names", "words"), [("ab", "a, b"), ("abc", "a, b, c"), ("abcd", "a, b, ... (2 more)")])
def test_a_list_is_shortened_by_several_names(names, words):
    assert shorten_list(list(names), 2) == words
