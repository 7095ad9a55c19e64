"""Unpacking: all of a good archive, nothing of a bad one."""

import io
import os
import shutil
import stat
import tarfile
import time
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import SoftFileLease

from delta_transfer.common.errors import UserError
from delta_transfer.data import archives
from delta_transfer.data.archives import unpack, unpack_archives
from delta_transfer.records.locks import LEASE_SECONDS

FILES = {"set/list.txt": b"a\nb\n", "set/images/1.jpg": os.urandom(70_000), "readme.txt": b"hello"}
SUFFIXES = [".tar", ".tar.gz", ".tgz", ".zip"]


def write(path: Path, files: dict[str, bytes] = FILES) -> Path:
    """An archive of the kind that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                member = zipfile.ZipInfo("x")
                member.filename = name  # the constructor would change some
                archive.writestr(member, content)
    else:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for name, content in files.items():
                add(archive, name, content)
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused(archive: Path, *expected: str) -> str:
    """The message; the archive's folder, and the one around it, are as before."""
    around = archive.parent.parent
    before = sorted(path.relative_to(around) for path in around.rglob("*"))
    with pytest.raises(UserError) as told:
        unpack(archive)
    for text in (str(archive), *expected):
        assert text in str(told.value)
    assert sorted(path.relative_to(around) for path in around.rglob("*")) == before
    return str(told.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder inside another one, so that a member that leaves it is seen."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_is_unpacked_beside_itself(folder, suffix):
    archive = write(folder / f"data{suffix}")
    packed = archive.read_bytes()
    assert unpack(archive) == [folder / "readme.txt", folder / "set"]
    assert contents(folder) == {**FILES, archive.name: packed}
    assert sorted(path.name for path in folder.iterdir()) == sorted([archive.name, "readme.txt", "set"])


def test_tars_made_from_a_dot_or_with_harmless_links_are_unpacked(folder):
    with tarfile.open(folder / "data.tar", "w") as archive:
        add(archive, ".", type=tarfile.DIRTYPE, mode=0o500)
        add(archive, "./set", type=tarfile.DIRTYPE, mode=0o755)
        add(archive, "./set/1.jpg", b"picture", mode=0o000)
        add(archive, "./set/same.jpg", type=tarfile.LNKTYPE, linkname="./set/1.jpg")
        add(archive, "./set/also.jpg", type=tarfile.SYMTYPE, linkname="1.jpg")
        add(archive, "./set/program", mode=0o6777)
    assert unpack(folder / "data.tar") == [folder / "set"]
    for name in ("1.jpg", "same.jpg", "also.jpg"):
        assert (folder / "set" / name).read_bytes() == b"picture"
    assert (folder / "set/1.jpg").stat().st_mode & 0o600 == 0o600
    assert (folder / "set/program").stat().st_mode & 0o7022 == 0  # nobody's rights but the owner's to write


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_macos_adds_is_left_out(folder, suffix):
    clutter = {"__MACOSX/set/._list.txt": b"", "set/.DS_Store": b"", "._set": b"", "set/images/._1.jpg": b""}
    archive = write(folder / f"data{suffix}", {**clutter, **FILES, "set/__MACOSX_or_not.txt": b"kept"})
    unpack(archive)
    archive.unlink()
    assert contents(folder) == {**FILES, "set/__MACOSX_or_not.txt": b"kept"}


# --- members that would end up elsewhere ---


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "set/../../evil",
        "set/..",
        "/tmp/evil",
        "//host/evil",
        "..\\evil",
        "set\\evil",
        "set\\..\\..\\evil",
        "C:/evil",
        "C:evil",
    ],
)
def test_names_that_leave_the_folder_are_refused(folder, suffix, name):
    archive = write(folder / f"data{suffix}", {**FILES, name: b"evil"})
    check_refused(archive, repr(name), "could end up outside")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["/etc", "../..", "../outside", "images/../../../x", "..", "C:\\Windows"])
def test_links_that_could_leave_the_folder_are_refused(folder, kind, target):
    with tarfile.open(folder / "data.tar", "w") as archive:
        add(archive, "set/list.txt", b"a")
        add(archive, "set/link", type=kind, linkname=target)
        add(archive, "set/link/evil", b"evil")
    check_refused(folder / "data.tar", "set/link", repr(target), "could end up outside")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_are_refused(folder, kind):
    with tarfile.open(folder / "data.tar", "w") as archive:
        add(archive, "set/list.txt", b"a")
        add(archive, "set/device", type=kind)
    check_refused(folder / "data.tar", "set/device", "neither a file nor a folder")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO])
def test_links_and_pipes_in_a_zip_are_refused(folder, kind):
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("set/list.txt", "a")
        member = zipfile.ZipInfo("set/link")
        member.external_attr = (kind | 0o777) << 16
        archive.writestr(member, "list.txt")
    check_refused(folder / "data.zip", "set/link", "neither a file nor a folder")


def test_an_old_python_unpacks_no_tar(folder, monkeypatch):
    archive = write(folder / "data.tar")
    monkeypatch.delattr(tarfile, "data_filter")
    check_refused(archive, "Python 3.11.4")


# --- damaged archives ---


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("part", [0, 0.3, 0.6, 0.95])
def test_truncated_archives_are_refused(folder, suffix, part):
    archive = write(folder / f"data{suffix}")
    content = archive.read_bytes()
    archive.write_bytes(content[: int(part * (70_000 if suffix == ".tar" else len(content)))])
    check_refused(archive, "fetch it again")


def test_a_tar_cut_off_between_two_members_is_refused(folder):
    archive = write(folder / "data.tar", {"set/1.txt": b"1", "set/2.txt": b"2", "set/3.txt": b"3"})
    content = archive.read_bytes()
    for length in (1024, 1024 + 300, 2048, 3072):
        archive.write_bytes(content[:length])
        check_refused(archive, "fetch it again")
    archive.write_bytes(content[:3584])  # one of the two blocks that mark the end is enough
    assert len(list(unpack(archive)[0].iterdir())) == 3


def test_a_tar_with_a_damaged_header_is_refused(folder):
    archive = write(folder / "data.tar", {"set/1.txt": b"1", "set/2.txt": b"2", "set/3.txt": b"3"})
    content = bytearray(archive.read_bytes())
    content[1024 + 4] ^= 1  # the name of the second member
    archive.write_bytes(content)
    check_refused(archive, "fetch it again")


@pytest.mark.parametrize("suffix", [".tgz", ".zip"])
@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_changed_byte_is_noticed(folder, suffix, place):
    archive = write(folder / f"data{suffix}", {"set/1.jpg": FILES["set/images/1.jpg"]})
    content = bytearray(archive.read_bytes())
    content[int(place * len(content))] ^= 1
    archive.write_bytes(content)
    check_refused(archive, "fetch it again")


def test_what_is_no_archive_is_refused(folder):
    for name in ("data.tar", "data.zip", "data.tgz"):
        (folder / name).write_bytes(b"<html>please log in</html>" * 50)
        check_refused(folder / name, "fetch it again")
    (folder / "data.rar").write_bytes(b"Rar!")
    check_refused(folder / "data.rar", "only .tar, .tar.gz, .tgz and .zip")
    check_refused(write(folder / "empty.zip", {}), "holds no file")
    check_refused(folder / "absent.tar", "FileNotFoundError")


def test_a_zip_with_a_password_is_refused(folder):
    archive = write(folder / "data.zip", {"a.txt": b"secret"})
    content = bytearray(archive.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + flags] |= 1
    archive.write_bytes(content)
    check_refused(archive, "password")


# --- what lies there, and room for more ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_that_lies_there_is_touched(folder, suffix):
    archive = write(folder / f"data{suffix}")
    (folder / "set").mkdir()
    (folder / "set" / "list.txt").write_text("mine")
    check_refused(archive, f"{folder} already has set.")
    assert (folder / "set" / "list.txt").read_text() == "mine"
    shutil.rmtree(folder / "set")
    (folder / "set").symlink_to("nowhere")
    check_refused(archive, f"{folder} already has set.")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_a_killed_process_left_is_removed(folder, suffix):
    archive = write(folder / f"data{suffix}")
    left = folder / f".unpacking-{archive.name}"
    (left / "set").mkdir(parents=True)
    (left / "half.txt").write_text("half")
    unpack(archive)
    assert not left.exists() and not (folder / "half.txt").exists()
    assert (folder / "set/images/1.jpg").read_bytes() == FILES["set/images/1.jpg"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_more_than_the_free_disk_space_is_refused_before_it_is_written(folder, suffix, monkeypatch):
    archive = write(folder / f"data{suffix}", {"zeros": bytes(1_000_000), "more": bytes(1_000_000)})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(archives, "_make_empty", None)  # calling it would be a TypeError
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1_999_999))
    check_refused(archive, "GB free")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2_000_000))
    assert unpack(archive)


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    archive = write(folder / "data.tar")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    monkeypatch.setattr(tarfile, "copyfileobj", full)
    check_refused(archive, "No space left")


# --- the archives of a data set ---


NEEDS = ("lists", "images/a.jpg")
ARCHIVES = ("lists.tgz", "images.zip")


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_archives_in_the_root_are_unpacked_where_they_lie(tmp_path):
    lists = write(tmp_path / "lists.tgz", {"lists/train.txt": b"a"})
    images = write(tmp_path / "images.zip", {"images/a.jpg": b"a"})
    assert unpack_archives(NEEDS, ARCHIVES, tmp_path) == [lists, images]
    assert contents(tmp_path).keys() >= {"lists/train.txt", "images/a.jpg"}
    # Nothing is to be done now, whatever the archives are.
    lists.write_bytes(b"damaged")
    assert unpack_archives(NEEDS, ARCHIVES, tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_may_hold_the_root_itself(tmp_path, monkeypatch, suffix):
    files = {"birds/images/a.jpg": b"a", "birds/lists": b"a", "attributes.txt": b"a"}
    archive = write(tmp_path / f"birds{suffix}", files)
    assert unpack_archives(NEEDS, [archive.name], tmp_path / "birds") == [archive]
    assert visible(tmp_path) == sorted(["attributes.txt", "birds", archive.name])
    assert unpack_archives(NEEDS, [archive.name], tmp_path / "birds") == []
    monkeypatch.chdir(tmp_path / "birds")
    assert unpack_archives(NEEDS, [archive.name], Path(".")) == []


@pytest.mark.parametrize("exists", [False, True])
def test_archives_beside_the_root_are_unpacked_into_it(tmp_path, monkeypatch, exists):
    lists = write(tmp_path / "lists.tgz", {"lists/train.txt": b"a"})
    images = write(tmp_path / "images.zip", {"images/a.jpg": b"a", "readme.txt": b"a"})
    root = tmp_path / "dogs"
    if exists:
        root.mkdir()
        monkeypatch.chdir(root)
        root = Path(".")
    assert unpack_archives(NEEDS, ARCHIVES, root) == [lists, images]
    assert visible(tmp_path) == ["dogs", "images.zip", "lists.tgz"]
    assert contents(tmp_path / "dogs") == {"lists/train.txt": b"a", "images/a.jpg": b"a", "readme.txt": b"a"}


def test_a_refused_archive_beside_the_root_makes_no_root(tmp_path):
    content = write(tmp_path / "images.zip", {"images/a.jpg": bytes(1000)}).read_bytes()
    (tmp_path / "images.zip").write_bytes(content.replace(bytes(500), b"x" * 500))  # its checksum is wrong now
    with pytest.raises(UserError, match="fetch it again"):
        unpack_archives(NEEDS, ARCHIVES, tmp_path / "dogs")
    assert visible(tmp_path) == ["images.zip"]


def test_archives_are_found_from_inside_the_data_sets_own_folder(tmp_path, monkeypatch):
    (tmp_path / "cars").mkdir()
    write(tmp_path / "cars/lists.tgz", {"lists/train.txt": b"a"})
    monkeypatch.chdir(tmp_path / "cars")
    assert unpack_archives(["cars/lists"], ["cars/lists.tgz"], Path(".")) == [tmp_path / "cars/lists.tgz"]
    assert (tmp_path / "cars/lists/train.txt").exists()


def test_an_interrupted_call_is_continued(tmp_path):
    write(tmp_path / "lists.tgz", {"lists/train.txt": b"a"})
    images = write(tmp_path / "images.zip", {"images/a.jpg": b"a"})
    unpack(tmp_path / "lists.tgz")
    assert unpack_archives(NEEDS, ARCHIVES, tmp_path) == [images]


def test_what_is_still_missing_is_told(tmp_path):
    assert unpack_archives(NEEDS, ARCHIVES, tmp_path) == []  # no archive: the reader will tell
    write(tmp_path / "lists.tgz", {"lists/train.txt": b"a"})
    (tmp_path / "lists").mkdir()
    write(tmp_path / "images.zip", {"images/a.jpg": b"a"})
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"lacks images/a.jpg\. .*images.zip is not unpacked: .* already has images"):
        unpack_archives(NEEDS, ["images.zip"], tmp_path)


def test_a_damaged_archive_of_a_data_set_is_told(tmp_path):
    (tmp_path / "lists.tgz").write_bytes(b"half")
    with pytest.raises(UserError, match="lists.tgz cannot be unpacked"):
        unpack_archives(NEEDS, ARCHIVES, tmp_path)


# --- several processes at once ---


def test_one_of_several_at_once_unpacks(tmp_path):
    """Threads stand for processes: each call has a lock of its own."""
    files = {f"images/{number}.jpg": b"picture" for number in range(300)}
    write(tmp_path / "images.zip", files)
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(unpack_archives, ["images"], ["images.zip"], tmp_path / "set") for _ in range(6)]
        assert sorted(len(call.result()) for call in calls) == [0, 0, 0, 0, 0, 1]
    assert contents(tmp_path / "set") == files


def test_who_waits_says_so_and_looks_again(tmp_path, capsys):
    archive = write(tmp_path / "images.zip", {"images/a.jpg": b"a"})
    output = ""
    lease = SoftFileLease(tmp_path / ".images.zip.lock", lease_duration=LEASE_SECONDS)
    with ThreadPoolExecutor(1) as pool, lease:
        call = pool.submit(unpack_archives, ["images"], ["images.zip"], tmp_path)
        end = time.monotonic() + 20
        while "waiting" not in output and time.monotonic() < end:
            time.sleep(0.01)
            output += capsys.readouterr().out
        assert f"waiting for another process that unpacks {archive}" in output
        assert visible(tmp_path) == ["images.zip"] and not call.done()
        unpack(archive)
        lease.release()
        assert call.result(20) == []
