"""delta-report trust: measures against worked examples, planted label errors, and the road from files to tables."""

import json
from base64 import b64decode
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import scipy
from PIL import Image

from delta_transfer import report
from delta_transfer.records import arrays
from delta_transfer.records.reading import read, run_folders
from delta_transfer.reporting import calibration as measures
from delta_transfer.reporting import page as module
from delta_transfer.reporting.calibration import Judged
from delta_transfer.reporting.thumbnails import thumbnail, with_thumbnails
from delta_transfer.reporting.trust import pool, trusted
from delta_transfer.reporting.trust_tables import as_json, by_class, confusions, flips, summary, suspicious, worst

from .test_report import record, save

# Three classes, six images: labels 0 0 0 1 1 2, answers 0 0 1 1 1 0.
P = np.array([[0.9, 0.1, 0], [0.6, 0.3, 0.1], [0.2, 0.8, 0], [0, 1.0, 0], [0.3, 0.5, 0.2], [0.4, 0.3, 0.3]])
SIX = Judged(np.array([0, 0, 0, 1, 1, 2]), P)


def test_rates_by_hand():
    counts = measures.confusion(SIX)
    assert counts.tolist() == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    found = measures.averages(counts)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["macro_f1"] == pytest.approx((4 / 6 + 4 / 5 + 0) / 3)
    # A class without images counts in neither mean, unless it was answered.
    empty = measures.averages(np.array([[2, 0, 0], [0, 0, 0], [1, 0, 1]]))
    assert empty["balanced_accuracy"] == pytest.approx(0.75)
    assert empty["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert [measures.top_k(SIX, k) for k in (1, 2, 3)] == pytest.approx([4 / 6, 1, 1])
    low, high = measures.wilson(9, 10)  # Wilson (1927), as in Newcombe's tables
    assert (low, high) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    for right, n in ((0, 7), (7, 7), (3, 1000)):
        found = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
        assert measures.wilson(right, n) == pytest.approx((found.low, found.high), abs=1e-12)


def test_calibration_by_hand():
    # Confidences 0.9 0.6 0.8 1.0 0.5 0.4, of which the third and the last are wrong.
    assert measures.calibration_error(SIX) == pytest.approx((0.1 + 0.4 + 0.8 + 0 + 0.5 + 0.4) / 6)
    two = measures.reliability(SIX, bins=2)
    assert [(b.n, b.right) for b in two] == [(1, 0), (5, 4)]
    assert two[1].confidence == pytest.approx(3.8 / 5)
    assert [measures.accuracy_at(SIX, coverage) for coverage in (1, 0.5, 0.01)] == [(4, 6), (2, 3), (1, 1)]


def sharpened(n=4000, factor=3.0):
    """Labels drawn from the softmax of logits, and the logits `factor` times as large."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(n, 4))
    p = measures.softmax(logits)
    labels = (p.cumsum(axis=1) > random.random((n, 1))).argmax(axis=1)
    return labels, factor * logits


def test_a_temperature_undoes_what_made_the_network_too_sure():
    labels, logits = sharpened()
    t = measures.temperature(labels, logits)
    assert t == pytest.approx(3, rel=0.1)
    before, after = (Judged(labels, measures.softmax(logits, one)) for one in (1.0, t))
    assert measures.calibration_error(before) > 0.2 > 0.03 > measures.calibration_error(after)


def test_planted_label_errors_are_found():
    """5 % wrong labels among images that are recognised in about 85 %: most of them are in the first tenth."""
    random = np.random.default_rng(0)
    true = np.arange(2000) % 10
    logits = random.normal(size=(2000, 10)) + 3.2 * np.eye(10)[true]
    planted = random.choice(2000, 100, replace=False)
    labels = true.copy()
    labels[planted] = (true[planted] + random.integers(1, 10, 100)) % 10
    judged = Judged(labels, measures.softmax(logits))
    assert 0.75 < (judged.predicted == true).mean() < 0.95
    order, wrong = measures.suspects(judged)
    assert np.isin(planted, order[:200]).mean() >= 0.9
    assert wrong[planted].mean() > 0.5 and wrong.mean() < 0.06  # it flags few that are right


def test_none_of_these_keeps_most_of_what_is_known():
    judged = Judged(*sharpened()[:1], measures.softmax(sharpened()[1]))
    assert (judged.confidence >= measures.none_of_these(judged)).mean() == pytest.approx(0.95, abs=0.01)


# ---- from files ------------------------------------------------------------------------------------------


def write(folder, one, what, index, labels, logits, names=None):
    run = folder / "runs" / one["run_id"]
    kept = {"labels": np.array(labels), "logits": np.float32(logits), "index": np.array(index)}
    np.savez(run / f"{what}.npz", **kept, **({"names": np.array(names)} if names else {}))
    (run / "classes.json").write_text(json.dumps(["ant", "bee", "<wasp>"]))


LABELS = [0, 0, 0, 1, 1, 2]


@pytest.fixture
def made(tmp_path):
    """Two runs on the same test images, and two folds of the first one's settings, which hold out four images."""
    folds = [
        record("delta", 0, None, run_id=f"fold{k}", split__folds=2, split__fold=k, val_top1=50.0) for k in range(2)
    ]
    runs = [record("delta", 0, 100 * 4 / 6), record("l2", 0, 100 * 2 / 6)]
    for one in folds + runs:
        one["num_classes"] = 3
    save(tmp_path, folds + runs)
    names = [f"test/{i}.png" for i in range(6)]
    write(tmp_path, runs[0], "predictions", range(6), LABELS, np.log(P + 1e-3), names)
    write(tmp_path, runs[1], "predictions", range(6), LABELS, np.log(P[::-1] + 1e-3), names)
    held_out = ([[0.1, 0.9, 0], [0.7, 0.2, 0.1]], [0, 0]), ([[0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], [1, 2])
    for k, (p, labels) in enumerate(held_out):
        index = [6 + k, 8 + k]
        write(tmp_path, folds[k], "validation", index, labels, np.log(np.array(p) + 1e-3), [f"{i}.png" for i in index])
    return tmp_path


def found_in(folder):
    return {one.record["run_id"]: one for one in trusted([read(path) for path in run_folders([folder])])}


def test_the_folds_of_a_run_are_what_is_fitted_on(made):
    delta, l2 = found_in(made).values()
    assert list(delta.held_out.images.items()) == [(i, f"{i}.png") for i in range(6, 10)]
    assert delta.held_out.labels.tolist() == [0, 1, 0, 2]
    assert l2.held_out is None and l2.temperature is None and l2.numbers["none_below"] is None
    assert delta.temperature == measures.temperature(delta.held_out.labels, delta.held_out.logits)
    assert delta.numbers["accuracy"] == pytest.approx(4 / 6) and delta.numbers["top5"] is None
    rows = [[entry.text for entry in row] for row in suspicious(delta, 9).rows]
    assert rows == [["6.png", "ant", "10.1", "bee", "89.8"]] and suspicious(l2, 9) is None
    temperature_column = summary([delta, l2]).header.index("temperature")
    assert summary([l2]).header.count("temperature") == 0 and temperature_column


def test_nothing_is_fitted_on_test_images(made):
    """Other test predictions leave the temperature and the threshold as they are."""
    one = next(iter(found_in(made).values()))
    other = replace(one, made=replace(one.made, logits=one.made.logits[::-1]))
    for key in ("temperature", "none_below"):
        assert one.numbers[key] == other.numbers[key]
    assert one.numbers["accuracy"] != other.numbers["accuracy"]


def test_tables_of_a_run(made):
    one = next(iter(found_in(made).values()))
    rows = [[entry.text for entry in row] for row in by_class(one, 2).rows]
    assert [row[0] for row in rows] == ["<wasp>", "ant"]  # the worst first
    assert rows[1][-2:] == ["3", "bee (1)"]
    assert [[entry.text for entry in row] for row in confusions(one, 9).rows] == [
        ["ant", "bee", "1", "33.3"],
        ["<wasp>", "ant", "1", "100.0"],
    ]
    assert [row[0].text for row in worst(one, 9).rows] == ["test/2.png", "test/5.png"]  # the surest mistake first


def test_flips_of_two_runs(made):
    one, other = found_in(made).values()
    ours = one.judged.right & ~other.judged.right
    rows = flips(one, other, 9).rows
    named = {row[0].text for row in rows if row[2].text == "DELTA"}
    assert named == {one.images[i] for i in np.flatnonzero(ours)}
    assert flips(one, replace(other, made=replace(other.made, index=other.made.index + 1)), 9) is None


def test_folds_alone_are_judged_as_one(made):
    folds = [one for one in map(read, run_folders([made])) if one["run_id"].startswith("fold")]
    [one] = trusted(folds)
    assert not one.tested and one.numbers["n"] == 4 and one.numbers["temperature"] is None
    # Two seeds of one image: their mean counts.
    twice = pool([(folds[0], arrays.predictions(folds[0], arrays.VALIDATION))] * 2)
    assert len(twice.labels) == 2


def test_the_page_shows_classes_and_images_of_the_best(made, monkeypatch):
    def page():
        assert report.main([str(made), "--format", "html", "--output", str(made / "page.html")]) == 0
        return (made / "page.html").read_text().partition('<section id="trust">')[2].partition("</section>")[0]

    both = page()
    assert all(f"<td>{name}</td>" in both for name in ("&lt;wasp&gt;", "6.png", "test/2.png")) and "McNemar" in both
    monkeypatch.setattr(module, "MOST", 1)
    best = page()
    assert best.count("<h3>") < both.count("<h3>") and "DELTA on CUB-200-2011, resnet18, seed 0: classes" in best
    assert "L2 on CUB" in best and "L2 on CUB-200-2011, resnet18, seed 0: classes" not in best


def test_the_page_shows_images_of_the_folder_and_of_no_other(made):
    photos = made / "photos"
    (photos / "test").mkdir(parents=True)
    Image.new("RGB", (300, 200), "red").save(photos / "test" / "2.png")
    Image.new("RGB", (9, 9)).save(made / "outside.png")
    (photos / "test" / "5.png").write_text("no image")
    (photos / "link.png").symlink_to(made / "outside.png")
    table = worst(next(iter(found_in(made).values())), 9)
    shown = [row[0].picture for row in with_thumbnails(table, photos).rows]  # test/2.png, test/5.png
    assert shown[1] == "" and Image.open(BytesIO(b64decode(shown[0].partition(",")[2]))).size == (96, 64)
    assert [thumbnail(photos, name) for name in ("../outside.png", str(made / "outside.png"), "link.png")] == [""] * 3
    command = [str(made), "--format", "html", "--output", str(made / "page.html")]
    assert report.main([*command, "--images", str(photos)]) == 0
    assert "data:image/jpeg" in (made / "page.html").read_text()


def test_json_and_command(made, capsys):
    assert report.main(["trust", str(made), "--format", "json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert {run["run_id"] for run in runs} == set(found_in(made))
    assert runs[0]["suspicious"] == ["6.png"] and np.sum(runs[0]["confusion"]) == 6
    assert as_json(list(found_in(made).values())).count("run_id") == 2
    for form in ("table", "markdown"):
        assert report.main(["trust", str(made), "--format", form, "--output", str(made / "out" / form)]) == 0
        assert "wasp" in (made / "out" / form).read_text()
    assert report.main(["trust", str(made / "out")]) == 1


def test_damaged_predictions_are_named(made, capsys):
    folder = made / "runs" / record("l2")["run_id"]
    (folder / "predictions.npz").write_bytes(b"PK half")
    (made / "runs" / record("delta")["run_id"] / "classes.json").unlink()
    assert report.main(["trust", str(made)]) == 0
    said = capsys.readouterr()
    assert str(folder) in said.err and "class 1" in said.out
