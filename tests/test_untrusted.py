"""Files and names that other people made: weights, archives, images, class folders, records.

Whatever is in them, no code runs, nothing leaves its folder or grows beyond measure, and what is wrong is one message.
"""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin
from safetensors.torch import save_file
from torchvision.models import ResNet18_Weights

from delta_transfer import report
from delta_transfer.cli.case_study import main as case_study
from delta_transfer.common.console import log, no_formula
from delta_transfer.common.errors import UserError
from delta_transfer.common.tables import Table, as_latex, as_markdown, entries, on_screen
from delta_transfer.data.archives import unpack
from delta_transfer.data.images import FORMATS, UNREADABLE, read_image
from delta_transfer.data.store import fit
from delta_transfer.inspect.case_study import tidy
from delta_transfer.models import Network
from delta_transfer.models.libraries import torchvision_weights
from delta_transfer.models.zoo import BackboneConfig, build_source
from delta_transfer.records import arrays, files
from delta_transfer.records import reading as runs
from delta_transfer.records.checkpoints import read_checkpoint
from delta_transfer.records.files import OUTPUT_MARK
from delta_transfer.records.weights import load_pickled

from .miniature import composed, delta_run, source_for
from .test_report import record, save
from .trees import write_image

KIB, MIB = 2**10, 2**20


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


# ---- weights and checkpoints -----------------------------------------------------------------------------


@cache
def small_resnet() -> BackboneConfig:
    return composed("backbone=small_resnet").backbone


def load(path: Path | str) -> Network:
    return build_source(small_resnet().replace(weights=str(path)), seed=0)


def small_state() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in load("none").weights().items()}


def refused(path: Path, *expected: str) -> None:
    with pytest.raises(UserError) as told:
        load(path)
    for text in (str(path), *expected):
        assert text in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_code_in_a_weights_file_does_not_run(tmp_path, suffix, zipped):
    path = tmp_path / f"evil{suffix}"
    torch.save({"fc.weight": Malicious(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "be read safely")
    path.write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    refused(path, "be read safely")
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())  # it would
    assert (tmp_path / "ran").exists()


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"target": Malicious(tmp_path / "ran")}, tmp_path / "last.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_pickled(tmp_path / "last.pt")
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content + sha256(content).digest())  # with the checksum of a run's own
    assert read_checkpoint(tmp_path / "last.pt", "this machine") is None
    assert not (tmp_path / "ran").exists()


def test_code_in_what_was_downloaded_before_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / ResNet18_Weights.IMAGENET1K_V1.url.split("/")[-1]
    path.parent.mkdir()
    torch.save({"fc.weight": Malicious(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match=f"remove {path}"):
        torchvision_weights("resnet18", "IMAGENET1K_V1")
    assert not (tmp_path / "ran").exists()


STATES = {
    "repeats one value": (lambda: {"a": torch.zeros(1).expand(10**7, 10**6)}, "claim 40,000,000.0 MB"),
    "repeats one half value": (lambda: {"a": torch.zeros(1).half().expand(10**7, 10**6)}, "claim 20,000,000.0 MB"),
    "repeats in many tensors": (lambda: {str(i): torch.zeros(500).expand(9, 500) for i in range(99)}, "claim 1.8 MB"),
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, "not plain numbers"),
    "complex": (lambda: {"a": torch.zeros(3, dtype=torch.complex64)}, "not plain numbers"),
    "without values": (lambda: {"a": torch.empty(3, device="meta")}, "not plain numbers"),
    "keys that are no names": (lambda: {1: torch.eye(3)}, "does not hold a state dict"),
    "not finite": (lambda: {"a": torch.eye(2), "b": torch.tensor([1, torch.inf])}, "not finite"),
    "beyond fp32": (lambda: {"b": torch.tensor([1e300], dtype=torch.float64)}, "beyond fp32) in b:"),
    "a number for a head": (lambda: small_state() | {"fc.weight": torch.tensor(1.0)}, "fc.weight has the shape ()"),
    "a head of nothing": (lambda: small_state() | {"fc.weight": torch.zeros(10**9, 0)}, "(1000000000, 0)"),
    "a flat head": (lambda: small_state() | {"fc.weight": torch.zeros(10**6, 1)}, "should be (classes, 128)"),
}


@pytest.mark.parametrize("case", STATES)
def test_tensors_that_are_not_what_a_network_has_are_refused(tmp_path, case):
    make, expected = STATES[case]
    torch.save(make(), tmp_path / "odd.pth")
    refused(tmp_path / "odd.pth", expected)


def test_the_tensors_that_are_not_finite_are_named(tmp_path):
    state = small_state()
    state["layer1.0.bn1.running_var"][2] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    refused(tmp_path / "nan.safetensors", "not finite", " in layer1.0.bn1.running_var:")


def test_quantised_tensors_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but files have them
        torch.save({"a": torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)}, tmp_path / "odd.pth")
    refused(tmp_path / "odd.pth", "not plain numbers")


def test_tensors_may_share_their_values_and_be_parts_of_others(tmp_path):
    state = small_state()
    whole = torch.cat([state["bn1.weight"], state["bn1.weight"]])
    state["bn1.weight"] = whole[: len(whole) // 2]
    state["bn1.running_var"] = state["bn1.weight"]
    torch.save(state, tmp_path / "shared.pth")
    assert torch.equal(load(tmp_path / "shared.pth").weights()["bn1.weight"], state["bn1.weight"])


def test_wrappers_without_end_are_refused(tmp_path):
    endless = {}
    endless["state_dict"] = endless
    torch.save(endless, tmp_path / "endless.pth")
    refused(tmp_path / "endless.pth", "does not hold a state dict")


def write_pickle(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        file.writestr("archive/version", "3\n")
    return path


def test_pickles_that_nest_or_ask_for_memory_are_refused(tmp_path):
    refused(write_pickle(tmp_path / "deep.pth", b"]" * 50_000 + b"a" * 49_999), "does not hold a state dict")
    ask = b"cbuiltins\nbytearray\n\x8a\x08" + (10**15).to_bytes(8, "little") + b"\x85R"
    refused(write_pickle(tmp_path / "large.pth", ask), "be read safely: MemoryError")


def test_compressed_weights_are_refused_before_they_are_read(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(MIB)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as file, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as bomb:
        for name in file.namelist():
            bomb.writestr(name, file.read(name))
    assert (tmp_path / "bomb.pth").stat().st_size < 10 * KIB
    assert torch.load(tmp_path / "bomb.pth", weights_only=True)["a"].shape == (MIB,)  # torch would unpack it
    monkeypatch.setattr(torch, "load", None)
    refused(tmp_path / "bomb.pth", "compressed")


def safetensors_file(path: Path, header: dict, data: bytes = b"", length: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize(
    ("entry", "length"),
    [
        ({"dtype": "F32", "shape": [10**9, 10**6], "data_offsets": [0, 4]}, None),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 10**12]}, None),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, 2**62),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, 3),
        ({"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}, None),
        ({"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}, None),
        ({"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}, None),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, entry, length):
    refused(safetensors_file(tmp_path / "lie.safetensors", {"a": entry}, bytes(entry["data_offsets"][1] % 999), length))


def test_folders_and_names_that_are_none_are_no_weights(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    refused(tmp_path / "folder.pth", "there is no file")
    refused(tmp_path / "nul\0.pth", "there is no file")


def test_a_name_in_a_weights_file_cannot_steer_the_terminal(tmp_path, capsys):
    save_file({"\x1b[2Jevil\u202e": torch.tensor([torch.nan])}, tmp_path / "nan.safetensors")
    with pytest.raises(UserError) as told:
        load(tmp_path / "nan.safetensors")
    log.error(str(told.value))
    shown = capsys.readouterr().err
    assert r"\x1b[2Jevil\u202e" in shown and "\x1b" not in shown and "\u202e" not in shown


# ---- archives --------------------------------------------------------------------------------------------


@pytest.fixture
def small_limit(monkeypatch):
    """Lowers the size of a bomb from a gigabyte to a megabyte."""
    monkeypatch.setattr(files, "GIB", MIB)


def check_refused(archive: Path, *expected: str) -> None:
    """Checks that the refusal is one message and leaves no file."""
    before = sorted(archive.parent.parent.rglob("*"))
    with pytest.raises(UserError) as told:
        unpack(archive)
    for text in (str(archive), *expected):
        assert text in str(told.value)
    assert sorted(archive.parent.parent.rglob("*")) == before


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def test_a_malicious_tar_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for name, fields in {
        "../evil": {},
        "/tmp/evil": {},
        "link": {"type": tarfile.SYMTYPE, "linkname": "../.."},
        "hard": {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"},
        "device": {"type": tarfile.CHRTYPE},
    }.items():
        with tarfile.open(tmp_path / "in" / "evil.tar", "w") as archive:
            add(archive, "good.jpg", b"good")
            add(archive, name, **fields)
        check_refused(tmp_path / "in" / "evil.tar", repr(name))


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "C:\\evil"])
def test_a_malicious_zip_is_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "evil.zip", "w") as archive:
        member = zipfile.ZipInfo("x")
        member.filename = name
        archive.writestr(member, b"evil")
    check_refused(tmp_path / "in" / "evil.zip", repr(name), "outside")


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar", ".zip"])
def test_a_bomb_is_refused_although_the_disk_has_room(tmp_path, suffix, small_limit):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / f"bomb{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("zeros", bytes(3 * MIB))
    else:
        with tarfile.open(archive, "w:gz") as file:  # also where the name does not say so
            add(file, "zeros", bytes(3 * MIB))
    check_refused(archive, "decompression bomb")


def test_a_bomb_is_not_unpacked_to_list_its_members(tmp_path, small_limit, monkeypatch):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "bomb.tgz", "w:gz") as file:
        for number in range(20):
            add(file, str(number), bytes(MIB))
    come, read = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: come.append(self.tell()) or read(self, size))
    check_refused(tmp_path / "in" / "bomb.tgz", "decompression bomb")
    assert MIB < max(come) <= files.most_unpacked((tmp_path / "in" / "bomb.tgz").stat().st_size) < 10 * MIB


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_without_end_is_not_read_into_memory(tmp_path, small_limit, kind):
    (tmp_path / "in").mkdir()
    header = tarfile.TarInfo("name")
    header.type, header.size = kind, 8 * 2**30  # 8 GB of name
    with gzip.open(tmp_path / "in" / "bomb.tgz", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT) + b"a" * 3 * MIB)
    check_refused(tmp_path / "in" / "bomb.tgz", "decompression bomb")
    (tmp_path / "in" / "bomb.tgz").unlink()
    (tmp_path / "in" / "short.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"a" * KIB)
    check_refused(tmp_path / "in" / "short.tar")


def test_text_that_shrinks_well_is_no_bomb(tmp_path, small_limit):
    with tarfile.open(tmp_path / "lists.tgz", "w:gz") as file:
        add(file, "list.txt", b"train/image.jpg 1\n" * 50_000)
    assert unpack(tmp_path / "lists.tgz") == [tmp_path / "list.txt"]


def test_members_that_overlap_are_refused(tmp_path):
    """One compressed piece that the list of members names a hundred times."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "overlap.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("one", bytes(100 * KIB))
    content = path.read_bytes()
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    entry = content[start:end]
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 100, 100, 100 * len(entry), start, 0)
    path.write_bytes(content[:start] + entry * 100 + tail)
    assert len(zipfile.ZipFile(path).namelist()) == 100
    check_refused(path, "overlap")


# ---- images ----------------------------------------------------------------------------------------------


def test_an_image_beyond_pillows_limit_is_unreadable(tmp_path, monkeypatch):
    assert Image.MAX_IMAGE_PIXELS == 89_478_485 and not ImageFile.LOAD_TRUNCATED_IMAGES
    write_image(tmp_path / "a.png")  # 120 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UNREADABLE, match="dataset.max_pixels"):
        read_image(tmp_path / "a.png")


def test_a_large_photo_below_the_limit_is_read_without_a_word(tmp_path):
    write_image(tmp_path / "a.png")
    code = (
        "import sys; from PIL import Image; from pathlib import Path; Image.MAX_IMAGE_PIXELS = 100\n"
        "from delta_transfer.data.images import read_image; print(read_image(Path(sys.argv[1])).size)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(12, 10)\n", "")


def png(path: Path, *chunks: tuple[bytes, bytes]) -> Path:
    """A PNG of one pixel with these chunks before its pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    header, pixels = struct.pack(">2L5B", 1, 1, 8, 0, 0, 0, 0), zlib.compress(b"\0\0")
    for kind, data in ((b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")):
        content += struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
    path.write_bytes(content)
    return path


def test_text_chunks_that_are_bombs_are_unreadable(tmp_path):
    assert read_image(png(tmp_path / "plain.png")).size == (1, 1)
    bomb = b"words\0\0" + zlib.compress(bytes(2 * PngImagePlugin.MAX_TEXT_CHUNK))
    with pytest.raises(UNREADABLE, match="too large"):
        read_image(png(tmp_path / "bomb.png", (b"zTXt", bomb)))


def test_only_formats_of_photographs_are_opened(tmp_path):
    Image.init()
    for name, kind in {"evil.jpg": "EPS", "old.png": "PCX", "icon.jpg": "ICO", "web.gif": "JPEG2000"}.items():
        if kind in Image.SAVE:
            Image.new("RGB", (20, 20)).save(tmp_path / name, kind)
            with pytest.raises(UNREADABLE, match="not an image"):
                read_image(tmp_path / name)
    for kind in FORMATS:  # whatever the file is called
        Image.new("RGB", (20, 10)).save(tmp_path / "photo.jpg", kind)
        assert read_image(tmp_path / "photo.jpg").size == (20, 10)
    Image.new("RGB", (20, 10)).save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[Image.new("L", (4, 4))])
    assert read_image(tmp_path / "two.jpg").size == (20, 10)


def test_a_line_of_pixels_does_not_become_gigabytes():
    line = Image.new("RGB", (100_000, 1))
    assert fit(line, 256, "squash").size == (256, 256)
    with pytest.raises(UNREADABLE, match="100000 x 1 pixels would become 25600000 x 256"):
        fit(line, 256, "keep")


# ---- names, on the whole road ----------------------------------------------------------------------------

EVIL = ["<script>alert(1)<", "[bold]$\\frac{$ | & %", "a..\x1b[2J\n= #"]  # no slash can be in the name of a folder


def test_class_folders_with_malicious_names_go_the_whole_road(tmp_path, monkeypatch, capsys):
    """Data set, runs, tables, page, case study: nothing is executed, steered or written elsewhere."""
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed: pip install 'delta-transfer[report]'")
    images, results, out = tmp_path / "images", tmp_path / "results", tmp_path / "out"
    for label, name in enumerate(EVIL):
        for number in range(6):
            write_image(images / name / f"{number}<b>.png", label)
    results.mkdir()
    source_for("scratch", results)
    overrides = [
        *("dataset=folder", f"dataset.root={images}", "backbone=small_resnet", "device=cpu"),
        f"backbone.weights={results / 'source.safetensors'}",
        *("backbone.image_size=16", "backbone.resize=20", "schedule.iterations=3", "schedule.batch_size=4"),
        f"results_dir={results}",
    ]
    folders = []
    for method in ("l2", "l2_fe"):
        assert delta_run(monkeypatch, *overrides, f"reg={method}") == 0
        folders += [path for path in (results / "runs").iterdir() if path not in folders]
    for form in ("html", "markdown", "latex", "csv", "json", "table"):
        assert report.main([str(results), "--format", form, "--output", str(out / f"report.{form}")]) == 0
    test = arrays.predictions(runs.read(folders[0])).index.tolist()
    shown = ["--images", ",".join(map(str, test)), "--output", str(out)]
    assert case_study([*map(str, folders), *shown]) == 0
    pages = "".join(path.read_text() for path in out.glob("report.*"))
    assert "<script>alert" not in pages
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err + pages and "Traceback" not in said.err
    made = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert made == {"images", "results", "out"}
    assert {path.name for path in out.iterdir() if not path.name.startswith("report")} == {
        *(f"{stem}.{kind}" for stem in ("chosen", "unused_channels") for kind in ("png", "pdf", "txt")),
        "unused_channels.md",
        OUTPUT_MARK,
    }


def test_an_unreadable_image_of_a_malicious_class_is_named_without_steering_the_terminal(tmp_path, monkeypatch, capsys):
    for label, name in enumerate(EVIL):
        write_image(tmp_path / "images" / name / "0.png", label)
        (tmp_path / "images" / name / "1.png").write_bytes(b"no image")
    images, results = tmp_path / "images", tmp_path / "results"
    names = ("dataset=folder", f"dataset.root={images}", "backbone=small_resnet", "backbone.weights=none")
    assert delta_run(monkeypatch, *names, f"results_dir={results}", "device=cpu") == 1
    said = capsys.readouterr()
    assert "3 images of images cannot be read" in said.err and r"a..\x1b[2J" in said.err
    assert "\x1b" not in said.out + said.err and "Traceback" not in said.err


def test_class_names_in_pictures_are_text():
    assert tidy(EVIL[2]) == r"a..\x1b[2J = #"
    assert tidy("012.Yellow_headed_Blackbird") == "Yellow headed Blackbird"


NAME = "\x1b[2J<script>alert(1)</script>[bold][x](http://x)|&\\input{x}\n\n=1+1\u202e\ud800"


def evil_records(folder: Path) -> Path:
    """Two runs whose records have NAME wherever there is text."""
    save(folder, [record("delta", seed) for seed in range(2)])
    for path in (folder / "runs").glob("*/summary.json"):
        one = json.loads(path.read_text())
        one |= {"run_id": path.parent.name + NAME, "device": NAME, "selection": NAME, "command": NAME}
        for group in ("dataset", "backbone", "reg"):
            one["config"][group]["name"] = NAME
        path.write_text(json.dumps(one))
    failed = record("l2", 0) | {"run_id": f"failed{NAME}", "error": NAME}
    (folder / "runs" / "failed").mkdir()
    (folder / "runs" / "failed" / "summary.json").write_text(json.dumps(failed))
    return folder


@pytest.mark.parametrize("form", ["table", "markdown", "latex", "csv", "json", "html"])
def test_names_in_records_are_only_text(tmp_path, form, capsys):
    folder, output = evil_records(tmp_path), tmp_path / "report"
    more = {"table": ["--figures", str(tmp_path / "figures")], "markdown": ["--layout", "matrix"]}
    assert report.main([str(folder), "--format", form, "--output", str(output), *more.get(form, [])]) == 0
    said = capsys.readouterr()
    text = output.read_text(encoding="utf-8")
    assert not {"\x1b", "\u202e"} & set(text + said.out + said.err) and "skipped failed" in said.err
    if form == "html":
        assert "<script>alert" not in text
    if form == "markdown":
        assert r"\<script>" in text and r"[x]\(http://x)\|&\\input" in text  # in a cell
    if form == "latex":
        assert r"\&\textbackslash{}input\{x\}" in text
        assert not any(r"\input" in line and not line.startswith("%") for line in text.splitlines())
    if form == "table":
        assert "[bold]" in text
        assert all(path.parent == tmp_path / "figures" for path in (tmp_path / "figures").rglob("*"))


def test_a_name_cannot_end_its_cell_or_its_line():
    table = Table("a\n# b", ["na|me", "x"], entries_of("a|b\\|c\nd", "1"), 1, [], ["note\n\\input{evil}", "<b> < 1"])
    text = as_markdown([table])
    assert r"a\|b\\\|c d" in text and r"na\|me" in text and "**a # b**" in text
    assert r"- \<b> < 1" in text and r"note \\input{evil}" in text
    assert "% note \\input{evil}\n" in as_latex([table])
    assert "[bold]" in on_screen([Table("t", ["[bold]", "x"], entries_of("[/bold]", "1"), 1)], terminal=False)


def entries_of(*cells: str) -> list[list]:
    return [entries(*cells)]


def test_texts_that_a_spreadsheet_would_compute_are_marked():
    for text in ("=1+1", "+x", "-x", "@x", "\uff1d1+1", "\uff0bx", "\uff0dx", "\uff20x", "\t=1", "-1+1"):
        assert no_formula(text) == f"'{text}"
    for value in ("alpha=0.1", -0.5, None, 3, "-1", "+0.5", "a=1"):  # a number computes nothing
        assert no_formula(value) == value


def test_predictions_that_are_a_bomb_or_no_numbers_are_damaged(tmp_path, small_limit):
    def check(expected: str, **values) -> None:
        np.savez_compressed(tmp_path / "predictions.npz", **values)
        with pytest.raises(runs.Damaged, match=expected):
            arrays.predictions({"folder": tmp_path})

    index = np.arange(3)
    check("bomb", labels=index, index=index, logits=np.zeros((3, MIB), dtype=np.float32))
    check("do not belong", labels=index, index=index, logits=np.full((3, 2), "x"))
    check("allow_pickle=False", labels=index, index=index, logits=np.array([Malicious(tmp_path / "ran")] * 3))
    assert not (tmp_path / "ran").exists()


def test_a_record_that_nests_without_end_is_unreadable(tmp_path):
    (tmp_path / "summary.json").write_text("[" * 100_000)
    assert "unreadable" in runs.read(tmp_path)
