"""Published numbers, and what sets our runs apart from them."""

from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.published import PROTOCOLS, against, find, published, what_is_known

from .test_report import record


def test_the_papers_table_is_whole():
    paper = [one for one in published() if one.protocol == "paper"]
    assert len(paper) == 48 and {one.method for one in paper} == {"l2", "l2_sp", "delta_noatt", "delta"}
    cells = {(one.dataset, one.backbone, one.method): one.mean for one in paper}
    assert cells["food101", "inception_v3", "delta"] == 80.8 and cells["mit67", "resnet101", "l2"] == 83.7
    assert all(one.std is None for one in paper)  # none is known


def test_every_number_has_a_source_a_protocol_and_appears_once():
    keys = [(o.protocol, o.dataset, o.backbone, o.method, o.n_train) for o in published()]
    assert len(set(keys)) == len(keys)
    assert all(one.source and one.protocol in PROTOCOLS and 0 < one.mean < 100 for one in published())
    assert {one.protocol for one in published()} == set(PROTOCOLS)


def test_of_several_parts_of_the_training_images_the_nearest():
    assert find("tll", "cub", "resnet50", "delta", 1800).mean == 67.3
    assert find("tll", "cub", "resnet50", "delta", 2500).mean == 76.3
    assert find("tll", "cub", "resnet50", "delta", None).n_train == 5994
    assert find("paper", "cub", "resnet50", "delta", 5994) is None


def full(**changes):
    """A run as published: DELTA on CUB with ResNet-101."""
    made = record(backbone__name="resnet101", backbone__image_size=224, schedule__batch_size=64, **changes)
    return made | {"iterations": 9000, "n_train": 5994, "n_test": 5794, "num_classes": 200}


def test_the_same_settings_differ_in_nothing():
    (match,) = against(compare([full(top1=80.0)]), "paper")
    assert match.number.mean == 80.5 and round(match.difference, 6) == -0.5 and match.differing == []


def test_what_differs_is_named_with_both_values():
    other = full() | {"iterations": 300, "num_classes": 50, "n_train": 500}
    other["config"]["backbone"] |= {"weights": "mine.pth", "image_size": 128}
    (match,) = against(compare([other]), "paper")
    assert match.differing == [
        "weights mine.pth (ImageNet)",
        "image_size 128 (224)",
        "iterations 300 (9000)",
        "classes 50 (200)",
        "n_train 500 (5994)",
    ]


def test_of_afa_the_iterations_of_both_stages_are_known_and_of_delta_beside_it_none():
    dogs = {"backbone__name": "resnet101", "backbone__image_size": 224, "schedule__batch_size": 64}
    counts = {"iterations": 400, "n_train": 12000, "n_test": 8580, "num_classes": 120}
    records = [record(method, dataset__name="dogs", **dogs) | counts for method in ("afa", "delta")]
    found = {match.method: match.differing for match in against(compare(records), "afa")}
    assert found == {"afa": ["iterations 400 (9000)"], "delta": []}


def test_other_weights_of_the_same_classes_differ():
    other = full(backbone__weights="IMAGENET1K_V2")
    (match,) = against(compare([other]), "paper")
    assert match.differing == ["weights IMAGENET1K_V2 (ImageNet)"]


def test_numbers_are_shown_as_published():
    assert [str(find("l2t_ww", "cub", "resnet18", name, None)) for name in ("l2t_ww", "lwf_at")] == ["65.05", "58.9"]
    assert str(find("afa", "dogs", "resnet101", "delta", None)) == "88.7 ± 0.1"


def test_without_a_published_number_nothing_is_compared():
    (match,) = against(compare([record()]), "paper")  # ResNet-18
    assert match.number is None and match.difference is None and match.differing == []


def test_the_only_published_backbone_stands_beside_another_without_a_difference():
    assert find("gtot_supervised", "bbbp", "gcn", "l2", 1631).mean == 68.7
    molecules = record(dataset__name="bbbp", backbone__name="gcn", backbone__image_size=1, schedule__batch_size=32)
    comparison = compare([molecules | {"n_train": 1631, "n_test": 204, "num_classes": 1}])
    (match,) = against(comparison, "gtot_supervised")
    assert match.number.backbone == "gin" and match.difference is None and match.differing == ["backbone gcn (gin)"]
    assert what_is_known(comparison, "gtot_supervised") == []
    (said,) = what_is_known(compare([record()]), "paper")
    assert said.endswith("only with resnet101, inception_v3")
