"""delta-export: the network as a file that computes the same in other programs."""

import json
import re
import runpy
import shutil
import sys
import threading
from http.server import HTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file

from delta_transfer.cli.export import main
from delta_transfer.cli.predict import main as predict
from delta_transfer.inspect.finished import finished
from delta_transfer.models import Network, portable
from delta_transfer.models.portable import bare_network, options_for
from delta_transfer.models.zoo import BackboneConfig
from delta_transfer.records.cards import read_card
from delta_transfer.records.files import OUTPUT_MARK

from .test_predict import made
from .test_replay import copied

RESNET = [
    "backbone=resnet18",
    "backbone.weights=none",
    "backbone.image_size=32",
    "backbone.resize=36",
    "backbone.mean=[0.2,0.5,0.7]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of torchvision's ResNet-18 on a miniature CUB."""
    return made(tmp_path_factory.mktemp("run"), *RESNET, "schedule.iterations=1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A run of a small network of our own, which is quicker to trace."""
    return made(tmp_path_factory.mktemp("tiny"))


def export(run: Path, form: str, output: Path) -> None:
    assert main([str(run), "--format", form, "--output", str(output)]) == 0


def expected(run: Path, images: torch.Tensor) -> torch.Tensor:
    """Logits of the run's network for RGB in 0..1, normalised by torchvision."""
    one = finished(run)
    backbone = one.config.backbone
    return one.network(torchvision.transforms.functional.normalize(images, backbone.mean, backbone.std))["logits"]


def images_of(run: Path, count: int) -> torch.Tensor:
    side = finished(run).config.backbone.image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def normalised(run: Path, images: torch.Tensor) -> torch.Tensor:
    backbone = finished(run).config.backbone
    return torchvision.transforms.functional.normalize(images, backbone.mean, backbone.std)


def test_torchvision_loads_the_state_dict_strictly(run, tmp_path):
    export(run, "safetensors", tmp_path / "bird.safetensors")
    network = torchvision.models.resnet18(num_classes=3).eval()
    network.load_state_dict(load_file(tmp_path / "bird.safetensors"), strict=True)
    images = images_of(run, 4)
    torch.testing.assert_close(network(normalised(run, images)), expected(run, images))


def test_timm_loads_the_state_dict_strictly(run, tmp_path):
    timm = pytest.importorskip("timm")
    export(run, "safetensors", tmp_path)
    network = timm.create_model("resnet18", num_classes=3).eval()
    network.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    images = images_of(run, 4)
    torch.testing.assert_close(network(normalised(run, images)), expected(run, images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_branches_that_were_not_trained_are_left_out(name):
    """A run leaves auxiliary branches out of its file; torchvision's constructor is told so."""
    with torch.device("meta"):
        whole = torchvision.models.get_model(name, num_classes=3, init_weights=False)
    weights = Network(whole, "fc").weights()
    assert options_for(name, weights) == {"aux_logits": False} and len(weights) < len(whole.state_dict())
    bare_network(BackboneConfig(name, "none", 64, 64, head="fc", taps=[]), 3, weights)
    assert options_for(name, whole.state_dict()) == {}


def test_torch_export_computes_the_same_for_any_number_of_images(tiny, tmp_path):
    export(tiny, "torch-export", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 5):
        images = images_of(tiny, count)
        torch.testing.assert_close(program(images), expected(tiny, images), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def onnx_file(tiny, tmp_path_factory) -> Path:
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("onnx")
    export(tiny, "onnx", folder)
    return folder / "model.onnx"


def test_onnx_computes_the_same_for_any_number_of_images(tiny, onnx_file):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = images_of(tiny, count)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, expected(tiny, images).numpy(), atol=1e-4)
    card = json.loads(session.get_modelmeta().custom_metadata_map["model_card"])
    assert card["classes"] == ["001.Bird_0", "002.Bird_1", "003.Bird_2"]
    assert [path.name for path in onnx_file.parent.iterdir() if path.name != "MODEL_CARD.md"] == ["model.onnx"]
    assert [value.shape[0] for value in (*session.get_inputs(), *session.get_outputs())] == ["batch", "batch"]


@pytest.mark.slow
def test_onnx_of_torchvisions_network_too(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export(run, "onnx", tmp_path / "bird.onnx")
    images = images_of(run, 3)
    session = onnxruntime.InferenceSession(tmp_path / "bird.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(logits, expected(run, images).numpy(), atol=1e-4)
    assert 'InferenceSession("bird.onnx")' in (tmp_path / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("name", ["bird.pt", "bird.safetensors", "bird.v2"])
def test_a_file_name_of_another_format_is_refused(tiny, name, tmp_path, capsys):
    assert main([str(tiny), "--format", "onnx", "--output", str(tmp_path / name)]) == 1
    assert name in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_the_card_says_to_do_can_be_done(tiny, onnx_file, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(shutil.copytree(onnx_file.parent, tmp_path / "files"))
    for form in ("safetensors", "torch-export"):
        export(tiny, form, Path())
    blocks = re.findall(r"```python\n(.*?)```", Path("MODEL_CARD.md").read_text(), re.S)
    assert len(blocks) == 3
    images = images_of(tiny, 2)
    for block, given in zip(blocks, (None, images.numpy(), images), strict=True):
        names = {"images": given}
        exec(block, names)
        logits = names["logits"] if "logits" in names else names["network"](normalised(tiny, images))
        np.testing.assert_allclose(torch.as_tensor(logits).detach(), expected(tiny, images), atol=1e-4)
        assert json.loads(names["card"])["classes"] == ["001.Bird_0", "002.Bird_1", "003.Bird_2"]


def test_onnx_without_onnxruntime_is_written_and_said_to_be_unverified(tiny, onnx_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    data = onnx_file.read_bytes()
    monkeypatch.setitem(portable.FORMATS, "onnx", (lambda *_: data, portable.logits_of_onnx))
    export(tiny, "onnx", tmp_path)
    output = capsys.readouterr().out
    assert "pip install 'delta-transfer[export]'" in output and "verified on" not in output
    assert (tmp_path / "model.onnx").read_bytes() == data


def test_onnx_without_its_packages_names_the_extra(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main([str(tiny), "--format", "onnx", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "pip install 'delta-transfer[export]'" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_card_and_metadata_say_what_the_network_is(run, tmp_path):
    export(run, "safetensors", tmp_path)
    record = json.loads((run / "summary.json").read_text())
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        card = json.loads(file.metadata()["model_card"])
    assert card["preprocessing"] == {
        "orientation": "as EXIF says",
        "transparency": "on white",
        "scale": None,
        "resize": 36,
        "aspect": "squash",
        "interpolation": "bilinear, antialiased",
        "center_crop": 32,
        "mean": [0.2, 0.5, 0.7],
        "std": record["config"]["backbone"]["std"],
    }
    assert card["classes"] == ["001.Bird_0", "002.Bird_1", "003.Bird_2"]
    words = (tmp_path / "MODEL_CARD.md").read_text()
    for said in (
        "cub",
        record["dataset_fingerprint"],
        "3: 001.Bird_0, 002.Bird_1, 003.Bird_2",
        f"{record['test_top1']:.2f} % of n = 6 test images",
        record["command"],
        f"torch {record['versions']['torch']}",
        "squashed to 36 x 36 pixels (bilinear, antialiased",
        "centre crop of 32 x 32 pixels",
        "measured in fp32",
        "minus [0.2, 0.5, 0.7]",
        'torchvision.models.get_model("resnet18", num_classes=3)',
    ):
        assert said in words
    assert read_card(tmp_path / "model.safetensors")["network"]["mean"] == [0.2, 0.5, 0.7]


def follow(words: str, path: Path, network: torch.nn.Module) -> np.ndarray:
    """The probabilities of an image, by the steps of a model card and nothing of this package."""
    steps = re.findall(r"^\d\. (.*)", words, re.M)
    assert len(steps) == 7
    turned, white, rgb, resized, cropped, scaled, _ = steps
    image = Image.open(path)
    if "EXIF" in turned:
        image = ImageOps.exif_transpose(image)
    if "on white" in white and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    assert "RGB" in rgb and "BILINEAR" in resized
    image = image.convert("RGB")
    if squashed := re.search(r"squashed to (\d+) x (\d+)", resized):
        image = image.resize((int(squashed[1]), int(squashed[2])), Image.Resampling.BILINEAR)
    else:
        size, short = int(re.search(r"resized to (\d+) pixels", resized)[1]), min(image.size)
        image = image.resize(tuple(size * side // short for side in image.size), Image.Resampling.BILINEAR)
    side = int(re.search(r"(\d+) x \d+ pixels", cropped)[1])
    right, bottom = image.width - side, image.height - side
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)] if "four corners" in cropped else []
    corners += [(round(right / 2), round(bottom / 2))]
    pictures = [image, ImageOps.mirror(image)] if "mirrored" in cropped else [image]
    crops = [picture.crop((x, y, x + side, y + side)) for picture in pictures for x, y in corners]
    mean, std = (torch.tensor(json.loads(values)).view(3, 1, 1) for values in re.findall(r"\[.*?\]", scaled))
    inputs = [(torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 255 - mean) / std for crop in crops]
    with torch.inference_mode():
        return network(torch.stack(inputs)).mean(dim=0).double().softmax(dim=0).numpy()


def odd_pictures(folder: Path) -> list[Path]:
    """A phone's photograph that is turned by EXIF, and pictures with transparency."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)).resize((91, 47))
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth.convert("RGB").save(folder / "phone.jpg", exif=turned)
    smooth.save(folder / "transparent.png")
    smooth.convert("RGB").quantize(16).save(folder / "palette.png", transparency=3)
    smooth.convert("L").save(folder / "grey.png")
    return sorted(folder.glob("*.*"))


@pytest.mark.parametrize(
    ("schedule", "mirror"),
    [({}, True), ({"aspect": "keep"}, True), ({"test_crops": 10}, True), ({"aspect": "keep", "test_crops": 10}, False)],
)
def test_who_follows_the_card_gets_the_probabilities_of_delta_predict(schedule, mirror, tiny, tmp_path, capsys):
    config = json.loads((tiny / "summary.json").read_text())["config"]
    config["schedule"] |= schedule
    config["dataset"]["mirror"] = mirror
    config["backbone"] |= {"mean": [0.2, 0.5, 0.7], "resize": 21}
    one = copied(tiny, tmp_path / "run", config=config)
    export(one, "safetensors", tmp_path / "out")
    words = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    (build,) = re.findall(r"```python\n(.*?)network.load", words, re.S)
    names: dict = {}
    exec(build, names)
    network = names["network"].eval()
    network.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    (tmp_path / "pictures").mkdir()
    pictures = odd_pictures(tmp_path / "pictures")
    capsys.readouterr()
    assert predict([str(one), *map(str, pictures), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["images"]
    for image, picture in zip(found, pictures, strict=True):
        expected = {entry["index"]: entry["probability"] for entry in image["classes"]}
        np.testing.assert_allclose(follow(words, picture, network), [expected[k] for k in range(3)], atol=2e-6)


def test_the_example_serves_the_probabilities_of_delta_predict(tiny, onnx_file, tmp_path, capsys):
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "serve_onnx.py"))
    server = HTTPServer(("127.0.0.1", 0), example["handler"](example["Classifier"](str(onnx_file))))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pictures = odd_pictures(tmp_path)
    capsys.readouterr()
    assert predict([str(tiny), *map(str, pictures), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["images"]
    try:
        for image, picture in zip(found, pictures, strict=True):
            with urlopen(f"http://127.0.0.1:{server.server_port}", picture.read_bytes()) as answer:
                served = {one["class"]: one["probability"] for one in json.load(answer)}
            assert served == pytest.approx({one["class"]: one["probability"] for one in image["classes"]}, abs=1e-5)
        with pytest.raises(HTTPError):
            urlopen(f"http://127.0.0.1:{server.server_port}", b"no image")
    finally:
        server.shutdown()


def test_names_of_classes_are_only_text_in_the_card(tiny, tmp_path):
    one = copied(tiny, tmp_path / "run", command="delta-run '<b>'")
    names = ["<img src=x onerror=alert(1)>", "[click](javascript:alert(1))", "a\n# b"]
    (one / "classes.json").write_text(json.dumps(names))
    export(one, "safetensors", tmp_path / "out")
    words = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert r"\<img" in words and r"[click]\(" in words and r"\<b>" in words
    assert not re.search(r"(?<!\\)<(img|b)\b|\]\(javascript|^# b", words, re.M)


def test_the_default_place_is_the_runs_folder(run, tmp_path):
    here = copied(run, tmp_path / "here")
    assert main([str(here), "--format", "safetensors"]) == 0
    made = {path.name for path in (here / "export").iterdir()} - {OUTPUT_MARK}
    assert made == {"MODEL_CARD.md", "model.safetensors"}


@pytest.mark.parametrize(
    "wrong", [lambda logits: logits + 1e-3, lambda logits: logits * float("nan"), lambda logits: logits[:1, :2]]
)
@pytest.mark.parametrize("form", list(portable.FORMATS))
def test_a_file_that_computes_something_else_is_not_written(form, wrong, tiny, tmp_path, monkeypatch, capsys):
    def outputs(data, images, network, name):
        return wrong(network(images))

    monkeypatch.setitem(portable.FORMATS, form, (lambda *_: b"", outputs))
    assert main([str(tiny), "--format", form, "--output", str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert form in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_exported_is_one_sentence(tiny, tmp_path, monkeypatch, capsys):
    def refuses(*_):
        raise RuntimeError("no such operator\nand a page of advice")

    monkeypatch.setitem(portable.FORMATS, "torch-export", (refuses, portable.logits_of_torch_export))
    assert main([str(tiny), "--format", "torch-export", "--output", str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert "no such operator" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_state_dict_with_a_changed_weight_is_found_out(tiny, tmp_path, monkeypatch, capsys):
    def damaged(network, size, metadata):
        network.network.fc.bias = torch.nn.Parameter(network.network.fc.bias + torch.tensor([0.1, 0, 0]))
        return portable.as_safetensors(network, size, metadata)

    monkeypatch.setitem(portable.FORMATS, "safetensors", (damaged, portable.logits_of_safetensors))
    assert main([str(tiny), "--format", "safetensors", "--output", str(tmp_path / "a.safetensors")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_another_networks_card_and_a_wrong_suffix_are_refused(run, tiny, tmp_path, capsys):
    export(run, "safetensors", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main([str(tiny), "--format", "safetensors", "--output", str(tmp_path / "other.safetensors")]) == 1
    assert str(tmp_path / "MODEL_CARD.md") in capsys.readouterr().err
    assert main([str(run), "--format", "torch-export", "--output", str(tmp_path / "model.onnx")]) == 1
    assert ".pt2" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "MODEL_CARD.md").unlink()
    assert main([str(run), "--format", "safetensors", "--output", str(tmp_path)]) == 1
    assert str(tmp_path / "model.safetensors") in capsys.readouterr().err
    (tmp_path / "model.safetensors").unlink()
    export(run, "safetensors", tmp_path)
    export(run, "safetensors", tmp_path)  # the same network again


def test_the_network_of_a_run_is_never_replaced(run, tiny, tmp_path, capsys):
    for number, described in enumerate((False, True)):
        other = copied(tiny, tmp_path / str(number))
        if described:  # as delta-pretrain's are
            export(run, "safetensors", tmp_path / "export")
            shutil.copy(tmp_path / "export" / "MODEL_CARD.md", other)
        before = (other / "model.safetensors").read_bytes()
        assert main([str(run), "--format", "safetensors", "--output", str(other)]) == 1
        assert capsys.readouterr().err.startswith(f"error: {other}")
        assert (other / "model.safetensors").read_bytes() == before
