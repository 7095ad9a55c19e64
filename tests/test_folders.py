"""Folders as people have them: every file in a class folder is used, or known junk, or counted and named."""

import os
import shlex
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from delta_transfer.common.errors import UserError
from delta_transfer.common.options import OptionError
from delta_transfer.data import images, load_dataset
from delta_transfer.data.dataset import Dataset
from delta_transfer.data.examination import examine
from delta_transfer.data.layout import split_named
from delta_transfer.data.readers.folder import FolderConfig
from delta_transfer.data.store import Store
from delta_transfer.data.tree import list_images, remarks
from delta_transfer.records.files import OUTPUT_MARK, make_output_folder

from .trees import write_folder, write_image


def read(root: Path, cache_dir: Path | None = None, **options: object) -> Dataset:
    return load_dataset(FolderConfig(reader="folder", root=str(root), **options), cache_dir)


def refused(root: Path, **options: object) -> str:
    with pytest.raises(UserError) as raised:
        read(root, **options)
    return str(raised.value)


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_folder(tmp_path / "photos", ants=4, bees=4)


def photograph(path: Path, number: int = 0, size: int = 64) -> Image.Image:
    """A smooth picture that survives resizing."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)
    return image


# ---- levels of folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train_set", "train"), ("seg_train", "train"), ("Training", "train"), ("TRAIN", "train")),
        *(("trainset", "train"), ("TrainImages", "train"), ("train2017", "train"), ("my train data", "train")),
        *(("test_set", "test"), ("Testing", "test"), ("TestSet", "test"), ("holdout", "test"), ("seg_test", "test")),
        *(("val", "val"), ("valid_images", "val"), ("Validation-Set", "val"), ("dev", "val")),
        *((name, None) for name in ("ants", "trains", "strain", "contest", "valley", "train_test", "seg_pred", "7")),
    ],
)
def test_names_of_splits(name, split):
    assert split_named(name) == split


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("train_set", "test_set"), ("seg_train", "seg_test"), ("TrainImages", "ValImages"), ("train", "test_set")),
        ("trainval", "test"),
    ],
)
def test_splits_under_other_names(tmp_path, train, test):
    counts = {f"{train}/ants": 3, f"{train}/bees": 3, f"{test}/ants": 2, f"{test}/bees": 1, "seg_pred": 0}
    data = read(write_folder(tmp_path, **counts))
    assert data.classes == ("ants", "bees") and data.is_test.tolist() == [False] * 6 + [True] * 3
    said = " ".join(data.remarks)
    assert f"{test}/" in said and "seg_pred/" in said and (train == "train" or f"{train}/" in said)


def test_splits_that_hold_themselves_once_more(tmp_path):
    parts = {f"seg_{part}/seg_{part}/{name}": 2 for part in ("train", "test") for name in ("ants", "bees")}
    data = read(write_folder(tmp_path, **parts))
    assert data.classes == ("ants", "bees") and data.is_test.sum() == 4
    assert "seg_train/seg_train/" in " ".join(data.remarks)


@pytest.mark.parametrize("names", [("fold1", "fold2"), ("A", "B", "C"), ("2019", "2020"), ("gallery", "query")])
def test_a_level_that_is_no_classes_is_refused(tmp_path, names):
    root = write_folder(tmp_path, **{f"{name}/{kind}": 3 for name in names for kind in ("ants", "bees")})
    message = refused(root)
    assert "ants, bees" in message and f"dataset.root={root / names[0]}" in message and "dataset.nested=true" in message
    assert read(root, nested=True).classes == names
    assert read(root / names[0]).classes == ("ants", "bees")


def test_splits_inside_the_folders_of_classes_are_refused(tmp_path):
    root = write_folder(tmp_path, **{f"{kind}/{part}": 3 for kind in ("ants", "bees") for part in ("train", "test")})
    assert "train/ants" in refused(root)
    assert read(root, nested=True).classes == ("ants", "bees")


@pytest.mark.parametrize("names", [("images", "masks"), ("JPEGImages", "Annotations", "SegmentationClass")])
def test_images_and_what_was_drawn_into_them_are_no_classes(tmp_path, names):
    assert "segmentation" in refused(write_folder(tmp_path / "photos", **dict.fromkeys(names, 4)))


def test_masks_beside_the_images_of_each_class_are_not_taken_for_images(tmp_path):
    root = write_folder(tmp_path, **{f"{name}/{part}": 3 for name in ("ants", "bees") for part in ("images", "masks")})
    assert "images, masks" in refused(root)
    data = read(root, ignore=["masks"])
    assert len(data.labels) == 6 and all("/images/" in name for name in data.names)


@pytest.mark.parametrize("name", ["more", "augmented", "masks"])
def test_a_copy_of_the_classes_beside_them_is_no_class(photos, name):
    write_folder(photos, **{f"{name}/ants": 2, f"{name}/bees": 2})
    assert f"dataset.ignore=[{name}]" in refused(photos)
    assert read(photos, ignore=[name]).classes == ("ants", "bees")


def test_folders_inside_class_folders_are_read_and_named(tmp_path):
    data = read(write_folder(tmp_path, **{"birds/wren": 2, "birds/owl": 2, "mammals": 3, "mammals/cat/old": 1}))
    assert data.classes == ("birds", "mammals") and len(data.labels) == 8
    (said,) = data.remarks
    assert "3 (birds/owl, birds/wren, mammals/cat/old)" in said


def test_a_class_called_like_a_split_stays_one(tmp_path):
    data = read(write_folder(tmp_path, **{"steam_train/side": 3, "bus/side": 3}))
    assert data.classes == ("bus", "steam_train")


@pytest.mark.parametrize("inside", ["photos", "a/b"])
@pytest.mark.parametrize("parts", [("",), ("train/", "test/")])
def test_a_wrapped_folder_is_told_which_to_type(tmp_path, inside, parts):
    counts = {f"{inside}/{part}{name}": 3 for part in parts for name in ("ants", "bees")}
    root = write_folder(tmp_path, **counts, docs=0)
    message = refused(root)
    assert message.endswith(f"dataset.root={root / inside}")
    assert read(root / inside).classes == ("ants", "bees")


def test_empty_class_folders_are_left_out_on_request(photos):
    (photos / "wasps").mkdir()
    assert "dataset.allow_empty=true" in refused(photos)
    data = read(photos, allow_empty=True)
    assert data.classes == ("ants", "bees") and "wasps/" in data.left_out


# ---- what is no data ------------------------------------------------------------------------------------


JUNK = ("@eaDir/00.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/._a.jpg", ".thumbnails/a.jpg", ".git/a.jpg", "#recycle/a.jpg")


def test_other_programs_files_are_junk(photos):
    before = read(photos)
    for place in (photos, photos / "ants", photos / "bees"):
        for name in (*JUNK, "lost+found/a.jpg", ".ipynb_checkpoints/a.jpg", "$RECYCLE.BIN/a.jpg", "._000.jpg"):
            write_image(place / name)
        for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
            (place / name).touch()
    after = read(photos)
    assert after.names == before.names and after.remarks == () and after.fingerprint == before.fingerprint


def results(folder: Path) -> None:
    write_image(folder / "figures" / "a.png")
    (folder / "runs" / "x-1").mkdir(parents=True)
    (folder / "runs" / "x-1" / "config.yaml").touch()


def marked(folder: Path) -> None:
    make_output_folder(folder)
    write_image(folder / "a.png")


def store(folder: Path) -> None:
    (folder / "stores" / "x").mkdir(parents=True)
    (folder / "stores" / "x" / "store.json").touch()
    write_image(folder / "a.png")


@pytest.mark.parametrize("write", [results, marked, store])
@pytest.mark.parametrize("place", ["results", "ants/out"])
def test_the_programs_own_output_is_no_data(photos, write, place):
    before = read(photos)
    write(photos / place)
    after = read(photos)
    assert after.names == before.names and f"{place}/" in after.left_out and place in " ".join(after.remarks)


def test_only_folders_that_were_made_are_marked(tmp_path):
    make_output_folder(tmp_path / "a" / "b")
    make_output_folder(tmp_path / "a" / "c")
    (tmp_path / "mine").mkdir()
    make_output_folder(tmp_path / "mine")
    assert [path.parent.name for path in tmp_path.rglob(OUTPUT_MARK)] == ["a"]


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError) as raised:
            make_output_folder(path)
        assert str(path) in str(raised.value)


def test_ignored_patterns_are_counted(photos):
    write_image(photos / "ants" / "a_mask.png")
    write_folder(photos, **{"bees/old": 2, "docs": 1})
    data = read(photos, ignore=["*_mask.png", "bees/old", "docs"])
    assert len(data.labels) == 8 and set(data.left_out) == {"ants/a_mask.png", "bees/old", "docs/"}


def test_a_pattern_that_matches_nothing_is_named(photos):
    write_image(photos / "ants" / "a_mask.png")
    assert any(
        "*_msk.png" in one and "*_mask.png" not in one
        for one in read(photos, ignore=["*_m*k.png", "*_msk.png"]).remarks
    )
    assert not any("ignore leaves" in one for one in read(photos, ignore=["*_mask.png"]).remarks)


def test_hidden_folders_of_images_are_named(photos):
    write_folder(photos, **{".net": 2})
    (photos / ".idea").mkdir()
    assert read(photos).left_out == {".net/": "hidden"}
    assert ".photos" in refused(write_folder(photos / "inner", **{".photos": 2}))


def test_a_fraction_that_changes_nothing_is_named(tmp_path):
    counts = {"train/ants": 3, "train/bees": 3, "test/ants": 1, "test/bees": 1}
    root = write_folder(tmp_path, **counts)
    assert not read(root).remarks and "0.5" in read(root, test_fraction=0.5).remarks[0]


# ---- every file in a class folder -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["00", "a.jpe", "a.jpg.1", "a.JPG_large", "a.tga", "a.JPEG_", "name.with.dots", "a.txt"]
)
def test_images_are_known_by_their_content(photos, name):
    write_image(photos / "ants" / "z.jpg")
    (photos / "ants" / "z.jpg").rename(photos / "ants" / name)
    data = read(photos)
    assert f"ants/{name}" in data.names and not data.left_out
    assert data.load(data.names.index(f"ants/{name}")).size == (12, 10)


@pytest.mark.parametrize(("name", "kind"), [("a.tga", "TGA"), ("a.jp2", "JPEG2000"), ("a.avif", "AVIF"), ("b", "AVIF")])
def test_formats_that_pillow_reads(photos, name, kind):
    Image.new("RGB", (12, 10), "red").save(photos / "ants" / name, kind)
    data = read(photos)
    assert data.load(data.names.index(f"ants/{name}")).size == (12, 10)


def odd_files(folder: Path) -> dict[str, str]:
    """Files that are no images, and a word of the reason."""
    (folder / "notes.txt").write_text("BM is no bitmap")
    (folder / "P1 of the list").write_text("P1 and more")
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(50))
    (folder / "raw.nef").write_bytes(b"II*\0" + bytes(50))
    (folder / "nothing").touch()
    (folder / "a.jpg.part").write_bytes(b"\xff\xd8\xff")
    (folder / "a.jpg~").write_bytes(b"\xff\xd8\xff")
    (folder / ".hidden.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "itself").symlink_to("itself")
    os.mkfifo(folder / "pipe.jpg")
    words = {"notes.txt": "no image", "P1 of the list": "no image", "film.mp4": "no image", "raw.nef": "raw"}
    words |= {"nothing": "empty", "a.jpg.part": "unfinished", "a.jpg~": "backup", ".hidden.jpg": "hidden"}
    return words | {"gone.jpg": "nowhere", "itself": "nowhere", "pipe.jpg": "regular"}


def test_what_is_no_image_is_counted_and_named(photos):
    words = odd_files(photos / "ants")
    data = read(photos)
    assert len(data.labels) == 8 and data.left_out.keys() == {f"ants/{name}" for name in words}
    assert all(word in data.left_out[f"ants/{name}"] for name, word in words.items())
    assert sum(f"ants/{name}" in " ".join(data.remarks) for name in words) == len(words)


def test_every_command_asks_the_same_function(photos):
    """delta-predict lists a folder by list_images alone."""
    odd_files(photos / "ants")
    listing, data = list_images(photos), read(photos)
    assert set(listing.images) == set(data.names) and listing.left_out == data.left_out
    assert len(list(remarks(photos, listing.left_out))) == len(set(listing.left_out.values()))


def test_linked_folders_and_files_are_followed(photos, tmp_path):
    write_folder(tmp_path / "elsewhere", **{"": 3})
    (photos / "ants" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (photos / "wasps").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (photos / "bees" / "linked.jpg").symlink_to(tmp_path / "elsewhere" / "000.jpg")
    data = read(photos)
    assert data.classes == ("ants", "bees", "wasps") and np.bincount(data.labels).tolist() == [7, 5, 3]


def test_links_without_end_are_named(photos):
    (photos / "ants" / "self").symlink_to(photos / "ants", target_is_directory=True)
    (photos / "ants" / "up").symlink_to(photos.parent, target_is_directory=True)
    (photos / "ants" / "below").mkdir()
    (photos / "ants" / "below" / "again").symlink_to(photos / "ants" / "below", target_is_directory=True)
    data = read(photos)
    assert len(data.labels) == 8 and data.left_out.keys() == {"ants/self/", "ants/up/", "ants/below/again/"}


def test_a_relative_root_is_read_alike(photos, monkeypatch):
    odd_files(photos / "ants")
    whole = read(photos, ignore=["ants/000.jpg"])
    monkeypatch.chdir(photos)
    here = read(Path("."), ignore=["ants/000.jpg"])
    assert (here.name, here.names, here.left_out) == (whole.name, whole.names, whole.left_out)
    assert here.fingerprint == whole.fingerprint


def test_heic_is_named_with_what_to_install(photos, monkeypatch):
    monkeypatch.setattr(images, "heif", lambda: False)
    for name in ("a.heic", "b.HEIF", "c"):
        (photos / "ants" / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (photos / "ants" / "d.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    data = read(photos)
    assert set(data.left_out) == {"ants/a.heic", "ants/b.HEIF", "ants/c"}
    assert all("delta-transfer[heif]" in why for why in data.left_out.values())
    (why,) = examine(data).unreadable.values()
    assert "delta-transfer[heif]" in why


def spoiled(folder: Path) -> dict[str, str]:
    whole = (folder / "000.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (folder / "noise.png").write_bytes(bytes(range(200)))
    return {"cut.jpg": "cut off", "empty.jpg": "empty", "page.jpg": "web page", "noise.png": "not an image"}


def test_files_that_cannot_be_read_are_named_with_the_reason(photos):
    words = spoiled(photos / "ants")
    data = read(photos)
    found = {data.names[index]: why for index, why in examine(data).unreadable.items()}
    assert found.keys() == {f"ants/{name}" for name in words}
    assert all(word in found[f"ants/{name}"] for name, word in words.items())


def test_unreadable_files_are_skipped_on_request(photos, tmp_path, monkeypatch):
    words = spoiled(photos / "ants")
    (tmp_path / "cache").mkdir()
    data = read(photos, tmp_path / "cache", unreadable="skip")
    assert data.left_out.keys() == {f"ants/{name}" for name in words} and len(data.labels) == 8
    assert all(name in " ".join(data.remarks) for name in words)
    assert not examine(data).unreadable and data.fingerprint != read(photos).fingerprint
    monkeypatch.setattr("delta_transfer.data.read_image", lambda *_: pytest.fail("decoded again"))
    again = read(photos, tmp_path / "cache", unreadable="skip")
    assert again.names == data.names and again.fingerprint == data.fingerprint


def test_the_largest_number_of_pixels_is_an_option(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # the images have 120
    assert len(examine(read(photos)).unreadable) == 8
    assert not examine(read(photos, max_pixels=120)).unreadable
    assert len(examine(read(photos, max_pixels=119)).unreadable) == 8


def write_deep_png(path: Path, values: np.ndarray) -> None:
    """(H, W, C) uint16, which Pillow does not write: colours, with or without alpha."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    written = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_more_than_8_bits_need_a_scale(photos, channels):
    """Pillow keeps the upper 8 bits: 12 bits would be nearly black."""
    values = np.full((4, 4, channels), 4095, np.uint16)
    values[..., -1] = 65535
    write_deep_png(photos / "ants" / "deep.png", values)
    (why,) = examine(read(photos)).unreadable.values()
    assert "dataset.scale=full" in why
    data = read(photos, scale="full")
    assert max(data.load(data.names.index("ants/deep.png")).getpixel((0, 0))[:1]) == 15
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    for kind in ("bmp", "png", "tif", "gif"):  # 8 bits stay what they were
        image.save(photos / "bees" / f"grey.{kind}")
    assert list(examine(read(photos)).unreadable.values()) == [why]


def test_a_scale_makes_another_data_set_and_no_scale_does_not(photos):
    plain, scaled = read(photos), read(photos, scale="full")
    assert plain.fingerprint != scaled.fingerprint and plain.names == scaled.names
    for wrong in ("none", "half", 0, -1, True, float("nan")):
        with pytest.raises(OptionError):
            FolderConfig(reader="folder", scale=wrong)


# ---- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test", "difference"),
    [
        (unicodedata.normalize("NFC", "abeille_é"), unicodedata.normalize("NFD", "abeille_é"), "Unicode"),
        ("Ants", "ants", "case"),
        ("ants", "ants ", "space"),
    ],
)
def test_classes_that_look_the_same_in_both_splits_are_one(tmp_path, train, test, difference):
    counts = {f"train/{train}": 3, "train/wasps": 3, f"test/{test}": 1, "test/wasps": 1}
    data = read(write_folder(tmp_path, **counts))
    assert (
        train in data.classes and len(data.classes) == 2 and np.bincount(data.labels[data.is_test]).tolist() == [1, 1]
    )
    (said,) = data.remarks
    assert difference in said and ascii(test) in said


def test_classes_that_look_the_same_in_one_split_are_refused(tmp_path):
    forms = [unicodedata.normalize(form, "abeille_é") for form in ("NFC", "NFD")]
    assert ascii(forms[1]) in refused(write_folder(tmp_path / "a", **dict.fromkeys(forms, 3)))
    assert "space" in refused(write_folder(tmp_path / "b", **{"ants": 3, "ants ": 3}))
    letters = read(write_folder(tmp_path / "c", a=3, A=3))
    assert letters.classes == ("A", "a") and "case" in letters.remarks[0]


def test_classes_without_a_test_image_are_named(tmp_path):
    counts = {"train/ants": 3, "train/bees": 3, "train/wasps": 3, "test/ants": 1, "test/bees": 1}
    data = read(write_folder(tmp_path, **counts))
    assert data.classes == ("ants", "bees", "wasps") and "wasps" in data.remarks[0]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("my photos", "my_photos"), ("é ü", "é_ü"), ("x=1", "x_1"), ("...", "folder"), ("a" * 300, "a" * 60)],
)
def test_a_data_set_is_called_like_its_folder(folder, name):
    assert FolderConfig(reader="folder", root=f"/data/{folder}").name == name
    assert FolderConfig(reader="folder", root=f"/data/{folder}", name="mine").name == "mine"


def test_the_name_is_no_part_of_what_a_run_is(photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "pictures")
    one, other, named = read(photos), read(moved), read(photos, name="mine")
    assert (one.name, other.name, named.name) == ("photos", "pictures", "mine")
    assert one.fingerprint == other.fingerprint == named.fingerprint
    assert {FolderConfig(reader="folder", root=str(root)).identity_name for root in (photos, moved)} == {"folder"}


# ---- labels in a table ----------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path) -> Path:
    write_folder(tmp_path / "flat", images=6)
    lines = [f"images/{number:03d}.jpg,{'bees' if number % 2 else 'ants'}" for number in range(6)]
    (tmp_path / "flat" / "labels.csv").write_text("\n".join(["file,label", *lines]) + "\n")
    return tmp_path / "flat"


def test_a_table_is_found_by_itself(table):
    data = read(table)
    assert data.classes == ("ants", "bees") and data.name == "flat" and len(data.labels) == 6
    assert {name: data.class_of(index) for index, name in enumerate(data.names)}["images/003.jpg"] == "bees"
    assert "labels.csv" in data.remarks[0] and not data.left_out


def test_a_table_may_lie_elsewhere_and_images_that_it_lacks_are_named(table, tmp_path):
    lines = (table / "labels.csv").read_text().splitlines()
    (table / "labels.csv").unlink()
    (tmp_path / "mine.csv").write_text("\n".join(lines[:-1]))
    data = read(table, labels=str(tmp_path / "mine.csv"))
    assert len(data.labels) == 5 and data.left_out == {"images/005.jpg": "not in mine.csv"}
    (table / "mine.csv").write_text("\n".join(lines))
    assert len(read(table, labels="mine.csv").labels) == 6
    assert "nowhere.csv" in refused(table, labels="nowhere.csv")


def test_a_table_that_a_spreadsheet_wrote(table):
    same = read(table)
    text = (table / "labels.csv").read_text()
    for changed in (
        "\ufeff" + text.replace(",", ";").replace("\n", "\r\n"),
        "sep=;\n" + text.replace(",", ";"),
        text.replace(",", "\t"),
        text.replace("file,label", " File , LABEL ,").replace("s\n", "s,\n"),
        text.replace("images/", "images\\"),
        text.replace("images/", "./images/"),
        text + ",\n\n",
    ):
        (table / "labels.csv").write_bytes(changed.encode())
        assert read(table).fingerprint == same.fingerprint, changed


def test_a_table_with_splits(table):
    lines = (table / "labels.csv").read_text().splitlines()
    splits = ["split", "train", "Train", "training", "train", "test", "TEST"]
    (table / "labels.csv").write_text("\n".join(f"{line},{split}" for line, split in zip(lines, splits, strict=True)))
    data = read(table)
    assert data.is_test.tolist() == [False] * 4 + [True] * 2 and data.names[4:] == ("images/004.jpg", "images/005.jpg")
    splits[-3:] = ["val", "test", "test"]
    (table / "labels.csv").write_text("\n".join(f"{line},{split}" for line, split in zip(lines, splits, strict=True)))
    data = read(table)
    assert len(data.labels) == 5 and data.left_out == {"images/003.jpg": "the split val"}


def with_column(table: Path, *cells: str) -> Path:
    lines = (table / "labels.csv").read_text().splitlines()
    (table / "labels.csv").write_text("\n".join(f"{line},{cell}" for line, cell in zip(lines, cells, strict=True)))
    return table


def test_columns_of_a_table_that_are_not_read_are_named(table):
    assert "patient" in read(with_column(table, "patient", *"112233")).remarks[0]


def test_splits_in_a_column_of_another_name_are_refused(table):
    message = refused(with_column(table, "Set", "train", "train", "train", "train", "test", "val"))
    assert "set" in message and "split" in message


def test_labels_that_name_several_classes_are_named(table):
    text = (table / "labels.csv").read_text()
    (table / "labels.csv").write_text(
        text.replace("4.jpg,ants", "4.jpg,ants;bees").replace("5.jpg,bees", "5.jpg,ants;bees")
    )
    assert "ants;bees" in read(table).remarks[-1] and read(table).classes == ("ants", "ants;bees", "bees")


def test_two_columns_of_splits_are_refused(table):
    splits = ["split", *["train"] * 4, *["test"] * 2]
    assert "each once" in refused(with_column(with_column(table, *splits), *splits))


def test_every_class_of_a_table_needs_training_images(table):
    lines = ["file,label,split", *(f"images/{i:03d}.jpg,{'ab'[i % 2]},train" for i in range(4))]
    for split, words in (("test", "training image: c"), ("train", "test image: b, c")):
        rest = [f"images/004.jpg,c,{split}", "images/005.jpg,a,test"]
        (table / "labels.csv").write_text("\n".join([*lines, *rest]))
        assert words in (refused(table) if split == "test" else " ".join(read(table).remarks))


def test_other_names_of_classes_are_another_data_set(table):
    one = read(table)
    (table / "labels.csv").write_text((table / "labels.csv").read_text().replace("ants", "aunts"))
    assert read(table).fingerprint != one.fingerprint


def test_numbers_are_classes_in_their_order(table):
    (table / "labels.csv").write_text((table / "labels.csv").read_text().replace("ants", "10").replace("bees", "9"))
    assert read(table).classes == ("9", "10")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("images/009.jpg,ants", ["line 8", "images/009.jpg"]),
        ("images/000.jpg,bees", ["line 8", "line 2", "ants and bees"]),
        ("images/000.jpg,ants", ["line 8", "line 2"]),
        ("images/000.jpg", ["line 8"]),
        ("images/000.jpg,ants,more", ["line 8"]),
        ("images/000.jpg, ", ["line 8"]),
        (",ants", ["line 8"]),
        ("../../x.jpg,ants", ["line 8", "x.jpg"]),
        ("/etc/passwd,ants", ["line 8", "/etc/passwd"]),
        ("labels.csv,ants", ["line 8", "labels.csv"]),
    ],
)
def test_wrong_lines_of_a_table_are_named(table, line, words):
    with open(table / "labels.csv", "a") as file:
        file.write(line + "\n")
    message = refused(table)
    assert all(word in message for word in words), message


def test_wrong_tables_are_named(table):
    (table / "labels.csv").write_text("name,class\na,b\n")
    assert "name, class" in " ".join(read(write_folder(table, ants=2, bees=2), ignore=["images"]).remarks)
    assert "name, class" in refused(table, labels="labels.csv")
    (table / "labels.csv").write_bytes("file,label\nimages/000.jpg,fourmi_é\n".encode("latin-1"))
    assert "UTF-8" in refused(table)
    (table / "labels.csv").write_text("file,label,split\nimages/000.jpg,ants,middle\nimages/001.jpg,bees,\n")
    message = refused(table)
    assert "line 2" in message and "middle" in message and "line 3" in message
    (table / "labels.csv").write_text("file,label,split\nimages/000.jpg,ants,test\nimages/001.jpg,bees,test\n")
    assert "train" in refused(table)
    (table / "labels.csv").write_text("file,label\nimages/000.jpg,ants\n")
    assert "ants" in refused(table)


def test_class_folders_beside_a_table_on_request(table):
    write_folder(table, wasps=3)
    assert len(read(table).labels) == 6
    assert read(table, labels="none").classes == ("images", "wasps")


def test_a_table_may_have_absolute_paths_below_the_folder(table, monkeypatch):
    lines = (table / "labels.csv").read_text().splitlines()
    found = read(table).names
    (table / "labels.csv").write_text("\r\n".join([lines[0], *(f"{table}/{line}" for line in lines[1:])]))
    assert read(table).names == found
    monkeypatch.chdir(table.parent)
    assert read(Path(table.name)).names == found


def test_why_a_table_is_none_is_said_where_the_folder_is_refused(table):
    (table / "labels.csv").write_text("Filename,Label\nimages/a.jpg,a\n")
    assert "lacks file" in refused(table)


def test_tables_are_read_or_named(table):
    expected = read(table).classes
    (table / "labels.csv").rename(table / "Labels.CSV")
    assert read(table).classes == expected
    (table / "Labels.CSV").rename(table / "train.csv")
    assert "train.csv" in refused(table) and "dataset.labels=" in refused(table)
    write_folder(table, ants=2, bees=2)
    assert any("not read: train.csv" in remark for remark in read(table, ignore=["images"]).remarks)


def test_a_refusal_says_which_folders_were_left_out(photos):
    for name in ("config.yaml", "metrics.jsonl"):
        (photos / "ants" / name).touch()
    assert "output of this program: 1 (ants/)" in refused(photos)


def test_labels_that_are_one_number_are_named(table):
    lines = (table / "labels.csv").read_text().splitlines()
    names = [line.rpartition(",")[0] for line in lines[1:]]
    rows = [f"{name},{'01' if number % 2 else '1'}" for number, name in enumerate(names)]
    (table / "labels.csv").write_text("\n".join([lines[0], *rows]))
    assert any("'01', '1' differ" in remark for remark in read(table).remarks)


def test_a_file_as_the_folder_is_refused_with_what_to_type(table):
    assert f"dataset.labels={table / 'labels.csv'}" in refused(table / "labels.csv")


@pytest.mark.parametrize("folder", ["my photos", "it's", "a;b", "p(1)"])
def test_advice_can_be_copied_into_a_shell(tmp_path, folder):
    root = write_folder(tmp_path / folder, **{"in side/ants": 2, "in side/bees": 2})
    (advice,) = shlex.split(refused(root).rpartition(": ")[2])
    assert len(read(Path(advice.partition("=")[2])).names) == 4
    (root / "in side" / "no thing").mkdir()
    assert "'dataset.ignore=[no thing]' or " in refused(root / "in side")


# ---- images ---------------------------------------------------------------------------------------------


def test_one_image_with_two_labels_is_named_with_both(photos):
    for number in range(4):
        photograph(photos / "bees" / f"{number:03d}.jpg", number)
    photograph(photos / "ants" / "a.png", 7)
    shutil.copy(photos / "ants" / "a.png", photos / "bees" / "b.png")
    data = read(photos)
    found = examine(data)
    assert len(found.conflicts) == 1
    (line,) = [line for line in found.lines() if "ants/a.png" in line and "bees/b.png" in line]
    assert "(ants)" in line and "(bees)" in line
    assert [set(pair) for pair in data.copies()[0]] == [{"ants/a.png", "bees/b.png"}]


def test_a_file_in_both_splits_is_found_without_decoding(gallery):
    assert read(gallery).copies() == ([], [])
    shutil.copy(gallery / "train" / "ants" / "1.jpg", gallery / "test" / "ants" / "copy.jpg")
    shutil.copy(gallery / "train" / "ants" / "1.jpg", gallery / "train" / "ants" / "again.jpg")
    assert read(gallery).copies() == ([], [("test/ants/copy.jpg", "train/ants/1.jpg")])


@pytest.mark.parametrize("kind", ["gif", "tif", "png", "webp"])
def test_files_of_several_pictures_are_named_by_all_who_read_them(photos, tmp_path, kind):
    # copies: Pillow remembers how an image was saved
    first, second = (photograph(tmp_path / "frames" / f"{n}.png", n, 20).copy() for n in range(2))
    first.save(photos / "ants" / f"single.{kind}")
    first.save(photos / "ants" / f"several.{kind}", save_all=True, append_images=[second])
    for _ in range(2):  # the second time the cache knows
        data = read(photos, tmp_path)
        assert data.of_several_pictures() == [f"ants/several.{kind}"]
    assert [data.names[index] for index in examine(data).several] == [f"ants/several.{kind}"]


def test_the_preview_behind_a_telephones_photograph_is_no_second_picture(tmp_path):
    first, second = (photograph(tmp_path / f"{n}.png", n) for n in range(2))
    first.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[second])
    assert not images.holds_several_pictures(tmp_path / "photo.jpg")


@pytest.fixture
def gallery(tmp_path) -> Path:
    """Smooth pictures, all of which differ."""
    for number in range(12):
        place = f"{'test' if number % 3 == 0 else 'train'}/{'ants' if number % 2 else 'bees'}"
        photograph(tmp_path / "gallery" / place / f"{number}.jpg", number)
    return tmp_path / "gallery"


def test_different_images_look_different(gallery):
    found = examine(read(gallery))
    assert not (found.leaks or found.near_leaks or found.conflicts or found.near_conflicts or found.constant)


@pytest.mark.parametrize(("size", "quality", "kind"), [(40, 90, "jpg"), (200, 60, "jpg"), (24, 95, "png")])
def test_nearly_the_same_image_in_train_and_test_is_named(gallery, size, quality, kind):
    image = Image.open(gallery / "train" / "ants" / "1.jpg").resize((size, size))
    image.save(gallery / "test" / "ants" / f"copy.{kind}", quality=quality)
    image.save(gallery / "train" / "bees" / f"copy.{kind}", quality=quality)
    data = read(gallery)
    found = examine(data)
    near = {tuple(data.names[index] for index in pair) for pair in found.near_leaks}
    assert near == {(f"test/ants/copy.{kind}", "train/ants/1.jpg")}
    assert any("train/bees/copy" in line and "(bees)" in line for line in found.lines())


def test_images_of_one_colour_are_named(photos):
    for number, colour in enumerate(("black", "red", "red")):
        Image.new("RGB", (9, 9), colour).save(photos / "ants" / f"plain{number}.png")
    data = read(photos)
    assert {data.names[index] for index in examine(data).constant} == {f"ants/plain{number}.png" for number in range(3)}
    shutil.copy(photos / "ants" / "plain0.png", photos / "bees")
    named = [pair for pair in examine(data).conflicts if "plain" in data.names[pair[0]]]
    assert not named


def test_a_store_knows_its_images_of_one_colour():
    spot = np.zeros((40, 40, 3), np.uint8)
    spot[7, 9] = 1
    plain, noise = np.full((5, 7, 3), 3, np.uint8), np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    assert Store.of([noise, plain, spot, plain[:1, :1]]).constant().tolist() == [1, 3]
