import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "publish_records.py"


def test_paths_are_cut_and_all_else_stays():
    spec = importlib.util.spec_from_file_location("publish_records", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    record = {
        "command": "delta-run -m dataset.root=/data/CUB backbone.weights=/w/r18.pth results_dir=results/cub",
        "overrides": ["source=[{use:/s/model.safetensors,taps:[layer1]},resnet34:/w/r34.pth]"],
        "config": {"dataset": {"root": "/data/CUB"}, "backbone": {"taps": ["layer1.1.conv2"]}},
        "device": "cpu: Some/Model, 1 threads",
        "test_top1": 57.4,
    }
    assert module.without_paths(record) == {
        "command": "delta-run -m dataset.root=CUB backbone.weights=r18.pth results_dir=results/cub",
        "overrides": ["source=[{use:model.safetensors,taps:[layer1]},resnet34:r34.pth]"],
        "config": {"dataset": {"root": "CUB"}, "backbone": {"taps": ["layer1.1.conv2"]}},
        "device": "cpu: Some/Model, 1 threads",
        "test_top1": 57.4,
    }
