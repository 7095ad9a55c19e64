"""Tables on screens of several widths: no number is ever cut, and no line is longer than the screen."""

import io

import pytest
from rich.console import Console

from delta_transfer.common.tables import Bar, Entry, Table, as_markdown, as_rich, bars, entries, latex, on_screen
from delta_transfer.reporting import sections
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.leaderboard import leaderboards

from .test_report import record

WIDTHS = [40, 80, 100, 140, 200]


def lines_of(made, width):
    out = io.StringIO()
    Console(width=width, file=out).print(as_rich(made, width))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def assert_whole(made, width):
    """Asserts that each number of the tables is unbroken in a line, and that each word is there."""
    lines = lines_of(made, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for entry in (entry for table in made for row in table.rows for entry in row[table.names :]):
        pieces = entry.text.split() if entry.value is None else [entry.text]
        assert all(piece in text for piece in pieces)
    return lines


def of_methods(count):
    names = ["l2", *(f"method_{i}" for i in range(1, count))]
    return compare(
        [record(name, seed, 50 + 3 * i + seed * (-1) ** i) for i, name in enumerate(names) for seed in (0, 1)]
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [5, 8, 23])
def test_no_number_of_a_report_is_cut(count, width):
    comparison = of_methods(count)
    lines = assert_whole(leaderboards(comparison, "l2"), width)
    if width >= 80:
        assert sum(" ± 0.7 " in line for line in lines) == count  # a line for each method, with all its numbers
        assert sum(any(mark in line for mark in "●◂▸") for line in lines) == count - 1
    matrix = [sections.accuracies(comparison), sections.differences(comparison, "l2"), sections.costs(comparison)]
    assert_whole(matrix, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_number_of_a_wide_table_with_long_names_is_cut(width):
    rows = [
        entries(f"a_data_set_with_a_long_name_{i}", f"layer{j}.2", *(Entry(f"{i}{j}.{k:03} %", k) for k in range(12)))
        for i in range(3)
        for j in range(4)
    ]
    header = ["attention of", "layer", *(f"mass of the top {k} %" for k in range(12))]
    assert_whole([Table("Weights", header, rows, 2)], width)
    words = "image_size 160 (224), iterations 300 (9000), batch_size 32 (64)"
    assert_whole(
        [Table("Words", ["set", "ours", "differs"], [entries("cub", Entry("57.4 ± 1.2 (3)", 57.4), words)], 1)], width
    )


def test_bars_stay_where_a_table_is_in_blocks_anyway_and_titles_of_names_are_not_cut():
    numbers = [Entry(f"{'9' * 20}{k}", k) for k in range(6)]
    rows = [entries(f"L{i}", Entry("", bar=Bar(0.5, 0.2, 0.7, 1.0)), *numbers) for i in range(5)]
    table = Table("T", ["method", "", *"abcdef"], rows, 1)
    lines = assert_whole([table], 80)
    assert any("●" in line for line in lines) and sum(line.startswith("method") for line in lines) > 1


def test_names_keep_their_brackets_and_settings_have_lines_of_their_own():
    table = Table(
        "T", ["set", "backbone", "settings", "L2"], [entries("[bold]", "r18", "lr=0.1, alpha=1", Entry("5", 5))], 3
    )
    assert lines_of([table], 80)[4:] == ["[bold], r18     5", "  lr=0.1", "  alpha=1"]


def test_in_a_pipe_long_words_wrap_and_nothing_else_does():
    def lines(words: str, name: str = "cub") -> list[str]:
        rows = [entries(name, Entry("57.4 ± 1.2 (3)", 57.4), "l2", words)]
        return on_screen([Table("", ["set", "ours", "method", "words"], rows, 1)], False).splitlines()

    assert max(map(len, lines("word " * 50))) <= 100 and len(lines("word " * 50)) > 3
    assert [len(lines(words, "x" * 90)) for words in ("w " * 15, "w " * 16, "w" * 40)] == [3, 4, 3]


def test_a_pipe_gets_lines_of_any_length_and_no_spaces_at_their_ends():
    text = on_screen(
        [Table("T", ["set", *"abc"], [entries("x" * 300, *(Entry("1" * 90, 1) for _ in "abc"))], 1)], False
    )
    assert max(map(len, text.splitlines())) > 500 and not any(line.endswith(" ") for line in text.splitlines())


def test_bars_share_an_axis_which_an_outlier_does_not_stretch():
    made = bars([(-1.0, 0.0, 1.0), (1.0, 2.0, 3.0), (-2.0, -1.0, 0.5), (-40.0, -30.0, -20.0)])
    assert made[0] == Bar(
        zero=pytest.approx(2 / 5), low=pytest.approx(1 / 5), mean=pytest.approx(2 / 5), high=pytest.approx(3 / 5)
    )
    assert all(0 <= part <= 1 for bar in made[:3] for part in (bar.low, bar.mean, bar.high))
    assert made[3].text(5)[0] == "◂" and {len(bar.text(5)) for bar in made} == {5}
    assert Bar(0.5, 0.25, 0.75, 1.0).text(9) == "  ──┼─●──"
    assert bars([(0.0, 0.0, 0.0)])[0].text(3) == " ● "


def test_bars_in_what_is_pasted():
    table = Table("T", ["method", ""], [entries("L2", Entry("", bar=Bar(0.5, 0.25, 0.75, 1.0)))], 1)
    assert "`····────┼───●────`" in as_markdown([table])
    assert r"\put(15.0,3){\line(1,0){45.0}}\put(45.0,3){\circle*{3}}" in latex(table)
