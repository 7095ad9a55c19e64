"""Every file of examples/ runs, for a few steps, and its penalty is in the loss."""

import math
import runpy
from pathlib import Path

import pytest

from .trees import write_folder

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDED = {
    "plain_loop.py": (),
    "lightning_module.py": ("lightning",),
    "hf_trainer.py": ("transformers", "accelerate"),
    "timm_backbone.py": ("timm",),
    "graph.py": ("torch_geometric",),
}
BY_HAND = ("own_images.py", "serve_onnx.py")  # they need images, or an exported run (test_export.py)
PENALTIES = {"timm_backbone.py": ("feature_maps", "weights", "vit/feature_maps")}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if packages else name for name, packages in NEEDED.items()]
)
@pytest.mark.filterwarnings("ignore")  # of others' packages
def test_an_example_runs_and_its_penalty_acts(name):
    for package in NEEDED[name]:
        pytest.importorskip(package)
    terms = runpy.run_path(str(EXAMPLES / name))["main"](steps=3)
    assert all(math.isfinite(value) for value in terms.values())
    for penalty in PENALTIES.get(name, ("feature_maps",)):
        assert terms[penalty] > 0  # the target has left the source, and is held


def test_the_example_of_own_images_compares_two_methods(tmp_path):
    example = runpy.run_path(str(EXAMPLES / "own_images.py"))["main"]
    tiny = {"backbone.weights": "none", "backbone.image_size": 32, "backbone.resize": 36}
    tiny |= {"schedule.iterations": 1, "schedule.batch_size": 4}
    photos = write_folder(tmp_path / "photos", ants=5, bees=5)
    accuracies = example(str(photos), settings=tiny, results_dir=str(tmp_path / "results"), device="cpu")
    assert set(accuracies) == {"L2", "DELTA w/o ATT"} and all(0 <= value <= 100 for value in accuracies.values())


def test_no_example_is_left_out_and_all_are_short():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*NEEDED, *BY_HAND}
    for name in (*NEEDED, *BY_HAND):
        assert len((EXAMPLES / name).read_text().splitlines()) < 80, name
