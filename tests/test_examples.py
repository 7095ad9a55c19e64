"""Every file of examples/ runs, for a few steps, and its penalty is in the loss."""

import math
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDED = {
    "plain_loop.py": (),
    "lightning_module.py": ("lightning",),
    "hf_trainer.py": ("transformers", "accelerate"),
    "timm_backbone.py": ("timm",),
    "graph.py": ("torch_geometric",),
}
PENALTIES = {"timm_backbone.py": ("feature_maps", "weights", "vit/feature_maps")}


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.filterwarnings("ignore")  # of others' packages
def test_an_example_runs_and_its_penalty_acts(name):
    for package in NEEDED[name]:
        pytest.importorskip(package)
    terms = runpy.run_path(str(EXAMPLES / name))["main"](steps=3)
    assert all(math.isfinite(value) for value in terms.values())
    for penalty in PENALTIES.get(name, ("feature_maps",)):
        assert terms[penalty] > 0  # the target has left the source, and is held


def test_no_example_is_left_out_and_all_are_short():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(NEEDED)
    for name in NEEDED:
        assert len((EXAMPLES / name).read_text().splitlines()) < 80, name
