"""Statistics against SciPy, worked examples and the published table."""

import math

import numpy as np
import pytest
from scipy import stats

from delta_transfer.records.arrays import Predictions
from delta_transfer.reporting import statistics
from delta_transfer.reporting.comparison import Cell, compare
from delta_transfer.reporting.published import published
from delta_transfer.reporting.statistics import by_image, contests, mcnemar, paired, ranks, winner

from .test_report import record


def cell(*values):
    return Cell({(seed, None): value for seed, value in enumerate(values)})


def predictions(correct, index=None):
    """Predictions of class 0 for right images, else of class 1. All labels are 0."""
    logits = np.array([[1.0, 0.0] if right else [0.0, 1.0] for right in correct])
    return Predictions(np.zeros(len(correct), int), logits, np.arange(len(correct)) if index is None else index)


def test_paired_interval_is_scipys():
    ours, theirs = [52.0, 55.0, 51.0, 58.0], [50.0, 54.5, 52.0, 54.0]
    made = paired(cell(*ours), cell(*theirs))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (made.low, made.high) == pytest.approx((expected.low, expected.high))
    assert (made.mean, made.n) == (pytest.approx(1.375), 4)


def test_paired_worked_example():
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027.
    made = paired(cell(11.0, 22.0, 33.0), cell(10.0, 20.0, 30.0))
    assert (made.low, made.high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    assert str(made) == "+2.0 [-0.5, +4.5] (3)" and not made.excludes_zero


def test_only_common_seeds_are_pairs():
    ours = Cell({(0, None): 10.0, (1, None): 20.0, (3, None): 99.0})
    theirs = Cell({(1, None): 18.0, (0, None): 9.0, (2, None): 0.0})
    assert paired(ours, theirs).n == 2 and paired(ours, theirs).mean == 1.5
    assert paired(cell(1.0), Cell({(7, None): 1.0})) is None


def test_a_single_pair_and_equal_differences_have_no_interval():
    assert str(paired(cell(52.0), cell(50.0))) == "+2.0 (1)"
    made = paired(cell(52.1, 53.1), cell(50.0, 51.0))  # few images often give equal differences; that is no certainty
    assert str(made) == "+2.1 (2)" and not made.excludes_zero


def test_by_image():
    ours, theirs = np.arange(400) % 10 < 8, np.arange(400) % 10 < 7  # 80 % against 70 %, apart in every tenth image
    made = by_image([(predictions(ours), predictions(theirs))])
    assert (made.mean, made.n) == (pytest.approx(10.0), 400)
    half = 1.96 * 100 * math.sqrt(0.1 * 0.9 / 400)  # of the mean of 400 zeros and ones
    assert (made.low, made.high) == pytest.approx((10 - half, 10 + half), abs=0.6)
    assert by_image([(predictions(ours), predictions(theirs))]) == made  # the resamples are the same ones


def test_seeds_do_not_make_more_images():
    ours, theirs = np.arange(200) % 10 < 8, np.arange(200) % 10 < 7
    one = by_image([(predictions(ours), predictions(theirs))])
    assert by_image([(predictions(ours), predictions(theirs))] * 3) == one


def test_by_image_refuses_other_images():
    right = np.ones(4, bool)
    with pytest.raises(ValueError, match="different test images"):
        by_image([(predictions(right), predictions(right, np.arange(4) + 1))])


def test_equal_predictions_differ_by_nothing():
    same = predictions([True, False, True])
    assert str(by_image([(same, same)])) == "0.0 (3)"
    assert mcnemar(same, same) == (0, 0, 1.0)


@pytest.mark.parametrize(("apart", "interval"), [(5, False), (6, True)])
def test_an_interval_over_images_needs_six_that_differ(apart, interval):
    """Five images on one side are not rare by chance: p = 2 / 2 ** 5."""
    ours, theirs = predictions([True] * apart + [False] * 4), predictions([False] * (apart + 4))
    assert by_image([(ours, theirs)]).excludes_zero == interval


def test_mcnemar_worked_example():
    # 8 images only we get right, 2 only they do: p = 2 * P(X <= 2), X ~ Binomial(10, 1/2) = 112 / 1024.
    ours, theirs = predictions([True] * 8 + [False] * 2), predictions([False] * 8 + [True] * 2)
    assert mcnemar(ours, theirs) == (8, 2, pytest.approx(112 / 1024))


# ---- who is ahead ----------------------------------------------------------------------------------------


def of(**values):
    """The single contest of methods with accuracies by seed."""
    made = compare([record(name, seed, value) for name, all_ in values.items() for seed, value in enumerate(all_)])
    (contest,) = contests(made)
    return contest


def test_the_winner_is_ahead_of_every_other_one():
    assert winner(of(l2=[50.0, 51.0, 52.0], delta=[53.0, 54.1, 55.0], l2_sp=[51.0, 51.0, 51.0])) == "delta"
    assert winner(of(l2=[50.0, 51.0, 52.0], delta=[53.0, 54.1, 55.0], l2_sp=[52.9, 54.2, 54.9])) is None
    assert winner(of(l2=[50.0], delta=[60.0])) is None  # one seed settles nothing
    assert winner(of(delta=[53.0, 54.0])) is None


def test_nobody_wins_where_a_method_has_several_settings():
    runs = [record("l2", s, 50.0 + s) for s in range(2)]
    runs += [record("delta", s, 60.0 + s, alpha=a) for s in range(2) for a in (0.1, 0.01)]
    (contest,) = contests(compare(runs))
    assert contest.several == ["delta"] and contest.cells.keys() == {"l2"} and winner(contest) is None


def test_settings_outside_reg_are_contests_of_their_own():
    runs = [record(schedule__iterations=n) for n in (100, 200)]
    assert len(contests(compare(runs))) == 2


# ---- ranks -----------------------------------------------------------------------------------------------


def test_ranks_of_the_published_table():
    rows = {}
    for one in published():
        if one.protocol == "paper":
            rows.setdefault((one.dataset, one.backbone), {})[one.method] = one.mean
    scores = list(rows.values())
    made = ranks(scores)
    assert made.rows == 12
    # By hand, from the table: DELTA is first in ten rows, second in Food-101/ResNet-101, and shares second and third
    # place in Dogs/Inception-v3.
    assert made.mean["delta"] == pytest.approx((10 * 1 + 2 + 2.5) / 12)
    assert sum(made.mean.values()) == pytest.approx(10)
    columns = [[row[m] for row in scores] for m in made.mean]
    assert made.friedman_p == pytest.approx(stats.friedmanchisquare(*columns).pvalue)
    # Demsar's table: q(0.05) = 2.569 for four methods.
    assert made.critical_difference == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 12)), abs=1e-3)


def test_few_rows_have_no_critical_difference():
    made = ranks([{"l2": 1.0, "delta": 2.0, "l2_sp": 2.0}] * 2)
    assert made.mean == {"l2": 3.0, "delta": 1.5, "l2_sp": 1.5} and made.critical_difference is None
    assert ranks([{"l2": 1.0, "delta": 2.0}]) is None and ranks([]) is None


# ---- equivalence -----------------------------------------------------------------------------------------


def cells_of(differences):
    values = {(seed, None): 50.0 + 3 * seed for seed in range(len(differences))}
    ours = {key: value + difference for (key, value), difference in zip(values.items(), differences, strict=True)}
    return Cell(ours), Cell(values)


def test_equivalence_worked_example():
    """Differences 1, 2, 3: mean 2, sd 1, so t = 3 sqrt(3) and sqrt(3) with 2 degrees of freedom (closed form of t)."""
    made = statistics.equivalence(*cells_of([1.0, 2.0, 3.0]), margin=1.0)
    below, above = 3 * math.sqrt(3), math.sqrt(3)
    assert made.p_no_worse == pytest.approx(0.5 - below / (2 * math.sqrt(2 + below**2)))
    assert made.p_no_better == pytest.approx(0.5 + above / (2 * math.sqrt(2 + above**2)))
    assert made.p_worse == pytest.approx(1 - made.p_no_worse) and made.found == "no worse"


@pytest.mark.parametrize(
    ("differences", "found"),
    [
        ([0.0, 0.1, -0.1, 0.05], "equal"),
        ([-3.0, -3.2, -2.9], "worse"),
        ([-3.0, 2.0, 1.0], "open"),
        ([5.0, 5.2, 4.9], "no worse"),
    ],
)
def test_what_equivalence_finds(differences, found):
    assert statistics.equivalence(*cells_of(differences), margin=1.0).found == found


def test_no_equivalence_without_a_spread_and_no_margin_of_nothing():
    assert statistics.equivalence(*cells_of([1.0]), margin=1.0) is None
    assert statistics.equivalence(*cells_of([1.0, 1.0]), margin=1.0) is None
    with pytest.raises(ValueError):
        statistics.equivalence(*cells_of([1.0, 2.0]), margin=0.0)


@pytest.mark.parametrize(("effect", "seeds"), [(0.5, 27), (0.8, 12), (0.01, None)])
def test_seeds_needed_is_what_g_power_says_of_a_one_sided_paired_t_test(effect, seeds):
    assert statistics.seeds_needed(effect) == seeds
