"""Whatever a person types and whatever a disk does to a file: one message, no stack trace, nothing half-written.

The suite tries a fixed number of fixed examples. DELTA_FAULTS=1 tries many more, others each time.
"""

import contextlib
import dataclasses
import io
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from delta_transfer import report
from delta_transfer.data.images import UNREADABLE, read_image
from delta_transfer.data.registry import READERS
from delta_transfer.engine.callbacks import AVERAGES
from delta_transfer.engine.config import RunConfig
from delta_transfer.engine.optimizers import DECAYS, OPTIMIZERS
from delta_transfer.methods import METHODS

from .miniature import delta_run, tiny_overrides, write_cub
from .test_report import record

FAULTS = int(os.environ.get("DELTA_FAULTS", "0"))


def fuzz(examples: int) -> settings:
    """So many examples, always the same ones; with DELTA_FAULTS=1 forty times as many, always others."""
    return settings(
        max_examples=40 * examples if FAULTS else examples,
        derandomize=not FAULTS,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # examples are short as they are, and shrinking a run takes minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


# --- configuration ---------------------------------------------------------------------------------------------------


def keys_of(schema: type, prefix: str) -> Iterator[tuple[str, type]]:
    for name, kind in get_type_hints(schema).items():
        yield prefix + name, kind
        for inner in filter(dataclasses.is_dataclass, (kind, *get_args(kind))):
            yield from keys_of(inner, f"{prefix}{name}.")


KEYS = dict(keys_of(RunConfig, ""))
for registry in (READERS, METHODS, OPTIMIZERS, AVERAGES):
    for registered in registry.entries.values():
        KEYS |= keys_of(registered.options, f"{registry.key.partition('.')[0]}.")

# Words that mean something somewhere, and nothing at most keys.
WORDS = sorted({"none", "auto", "cpu", "cuda", "fp32", "bf16", "keep", "squash", "random", "random_resized", "fixed"}
    | {"all", "conv", "exact", "taylor", "tensorboard", "fc", "conv1", "layer1.0.conv1", "layer1", "resnet18"}
    | {*READERS, *METHODS, *OPTIMIZERS, *AVERAGES, *DECAYS})  # fmt: skip
# Small, or so large that it must be refused or do no harm: what lies between may be meant, and takes its time.
SMALL = st.integers(-2, 24)
ABSURD = st.sampled_from([2**31, 10**10, 2**62, 2**63, 2**64, 10**30, 10**400, -(2**63), -(10**30)])
FLOATS = st.sampled_from(["0.0", "0.5", "1.0", "-0.5", "2.75", "1e-3", "1e-320", "1e38", "1e308", "-1e308"])
NOT_NUMBERS = st.sampled_from(["nan", "inf", "-inf", "1e999", "0x10", "1_0", "1e", "--1", "½", "1.2.3"])
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), max_size=8)
GRAMMAR = st.text("{}[](),=:'\"\\$@~+!|.*# \t\nax1-", max_size=8)
REFERENCES = st.sampled_from(
    ["${seed}", "${oc.env:DELTA_FUZZ_UNSET}", "${oc.env:DELTA_FUZZ_UNSET,7}", "${reg}", "${reg.name}", "${schedule}"]
    + ["${nothing}", "${backbone.resize}", "${hydra:runtime.cwd}", "${now:%Y}", "${oc.decode:'[1,'}", "${", "???"]
    + ["${results_dir}", "${sweep_dir:a,b}", "${sweep_dir:a}", "\\${seed}", "${..seed}", "${oc.select:seed}"]
)
CALLS = st.sampled_from(["range(2)", "glob(*)", "choice(0,1)", "int(a)", "cast()", "sort(2,1)", "interval(0,1)"])
QUOTED = st.one_of(TEXT, GRAMMAR).map(lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'")
ANYTHING = st.one_of(
    SMALL.map(str),
    ABSURD.map(str),
    FLOATS,
    NOT_NUMBERS,
    TEXT,
    GRAMMAR,
    QUOTED,
    REFERENCES,
    CALLS,
    st.sampled_from(WORDS),
    st.sampled_from(["true", "false", "null", "", "{}", "[]", "{a: 1}", "{name: l2}", "[1,[2]]", "[null]", "0,1", "~"]),
    st.lists(st.one_of(SMALL.map(str), FLOATS, ABSURD.map(str), st.sampled_from(WORDS)), max_size=4).map(
        lambda items: f"[{','.join(items)}]"
    ),
)


def right_type(kind: type) -> st.SearchStrategy[str]:
    """Values that Hydra takes for a field of this type, sensible or not."""
    kinds = {kind, *get_args(kind)}
    choices = [st.just("null")] if type(None) in kinds else []
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        return st.lists(right_type(inner), max_size=4).map(lambda items: f"[{','.join(items)}]")
    if bool in kinds:
        choices += [st.sampled_from(["true", "false"])]
    if int in kinds:
        choices += [SMALL.map(str), ABSURD.map(str)]
    if float in kinds:
        choices += [FLOATS, SMALL.map(str), st.sampled_from(["nan", "inf", "-inf"])]
    if str in kinds:
        choices += [st.sampled_from(WORDS), QUOTED]
    return st.one_of(choices) if choices else ANYTHING


def assignment(key: str, value: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    if key.endswith("_dir"):  # written to: below the folder of the example
        value = value.filter(lambda text: ".." not in text and not text.strip("'\" ").startswith("/"))
    return st.tuples(st.sampled_from(["", "", "", "", "+", "++"]), value).map(
        lambda drawn: f"{drawn[0]}{key}={drawn[1]}"
    )


def misspelt(key: str) -> st.SearchStrategy[str]:
    return st.integers(0, len(key) - 1).map(lambda i: f"{key[:i]}{key[i + 1 :]}x=1")


GROUPS = st.sampled_from(
    [f"dataset={name}" for name in ("cub", "dogs", "lfw", "folder", "glyphs", "glyph_pairs")]
    + ["dataset=lists", "dataset=nothing", "dataset=", "dataset=[cub,dogs]", "average=ema", "average=nothing"]
    + [f"schedule={name}" for name in ("paper", "paper_augmented", "quick", "tll", "glyphs", "null", "Paper")]
    + ["optimizer=adamw", "optimizer=sgd", "optimizer=adam", "optimizer.name=adamw", "~optimizer"]
    + ["backbone=resnet18", "backbone=resnet", "backbone=mobilenet_v2", "backbone={name: resnet18}"]
    + ["experiment/values=dogs_delta", "experiment/values=none", "experiment/values=a", "+experiment=nothing"]
    + ["optional/group=1", "+schema/reg@reg=l2_sp", "schema/reg@reg=delta", "reg@dataset=l2", "+reg@other=l2"]
    + ["~reg", "~dataset", "~split", "~schedule", "hydra=1", "hydra.nothing=1", "hydra/launcher=nothing", "+new=1"]
    + ["+reg.new=1", "+new={a: [}", "++reg={name: l2}", "dataset.official.classes=null", "dataset.official=null"]
)
CHOICES = st.sampled_from(
    [["reg=l2"], ["reg=l2_fe"], ["reg=l2_sp"], ["reg=delta_noatt"]]
    + [["reg=delta", "reg.attention.images=4", "reg.attention.head_epochs=1"]]
)
KEY = st.sampled_from(sorted(KEYS))
VALUED = [key for key, kind in sorted(KEYS.items()) if {bool, int, float, str} & {kind, *get_args(kind)}]
OTHERS = [key for key in VALUED if key.partition(".")[0] not in ("dataset", "reg")]  # which every run has
VALID = st.one_of(st.sampled_from(OTHERS), st.sampled_from(VALUED)).flatmap(
    lambda key: right_type(KEYS[key]).map(lambda value: f"{key}={value}")
)
OVERRIDE = st.one_of(
    KEY.flatmap(lambda key: assignment(key, ANYTHING)),
    KEY.flatmap(lambda key: assignment(key, ANYTHING)),
    KEY.flatmap(misspelt),
    KEY.map(lambda key: f"~{key}"),
    GROUPS,
    VALID,
)


@pytest.fixture(scope="module")
def cub_root(tmp_path_factory) -> Path:
    return write_cub(tmp_path_factory.mktemp("data") / "CUB_200_2011")


def no_network(*_args, **_kwargs):
    raise OSError("There is no network in a test.")


def run_in(folder: Path, *overrides: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `delta-run <overrides>` started in `folder`."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.delenv("DELTA_FUZZ_UNSET", raising=False)
        patch.setattr(torch, "compile", lambda module: module)  # starts a compiler
        patch.setattr(socket, "create_connection", no_network)
        status = delta_run(patch, *overrides)
    return status, out.getvalue(), err.getvalue()


def half_written(folder: Path) -> list[Path]:
    """What no reader can use: files under a temporary name, and run folders that neither finished nor failed."""
    found = [path for path in folder.rglob(".*.tmp")]
    for run in folder.glob("**/runs/*"):
        try:
            summary = json.loads((run / "summary.json").read_text())
        except (OSError, ValueError):
            found.append(run)
        else:
            if summary["error"] is None and not (run / "model.safetensors").exists():
                found.append(run)
    return found


@fuzz(8)
@given(method=CHOICES, overrides=st.lists(VALID, min_size=1, max_size=3))
def test_no_value_gives_a_stack_trace_or_half_a_run(method, overrides, cub_root):
    check_command(cub_root, [*method, *overrides])


@fuzz(8)
@given(mode=st.sampled_from([[], [], ["-m"]]), method=CHOICES, overrides=st.lists(OVERRIDE, min_size=1, max_size=4))
def test_no_override_gives_a_stack_trace_or_half_a_run(mode, method, overrides, cub_root):
    check_command(cub_root, [*method, *overrides], mode)


def check_command(cub_root: Path, overrides: list[str], mode: Sequence[str] = ()) -> None:
    with tempfile.TemporaryDirectory() as folder:
        status, out, err = run_in(Path(folder), *mode, *tiny_overrides(cub_root, Path("results")), *overrides)
        assert status in (0, 1)
        assert status == 0 or err.strip()
        assert "Traceback" not in out + err, err
        assert not half_written(Path(folder))


# --- images ----------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture_files() -> dict[str, bytes]:
    """A small file of each kind that data sets hold."""
    pixels = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a bird", zip=True)
    text.add_itxt("Title", "ein Vögelchen", lang="de")
    palette = rgb.quantize(16)
    return {
        "jpeg": encoded(rgb, "JPEG", exif=exif),
        "progressive jpeg": encoded(rgb, "JPEG", progressive=True, comment=b"a bird"),
        "grey jpeg": encoded(rgb.convert("L"), "JPEG"),
        "cmyk jpeg": encoded(rgb.convert("CMYK"), "JPEG"),
        "mpo": encoded(rgb, "MPO", save_all=True, append_images=[rgb]),
        "png": encoded(rgb, "PNG", pnginfo=text, exif=exif),
        "palette png": encoded(palette, "PNG", transparency=3),
        "16-bit png": encoded(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG"),
        "rgba png": encoded(rgb.convert("RGBA"), "PNG"),
        "grey alpha png": encoded(rgb.convert("LA"), "PNG"),
        "1-bit png": encoded(rgb.convert("1"), "PNG"),
        "apng": encoded(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)]),
        "gif": encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(180)], transparency=1),
        "bmp": encoded(rgb, "BMP"),
        "tiff": encoded(rgb, "TIFF", compression="tiff_lzw", exif=exif),
        "jpeg tiff": encoded(rgb, "TIFF", compression="jpeg"),
        "plain tiff": encoded(rgb, "TIFF"),
        "webp": encoded(rgb, "WEBP", exif=exif),
        "lossless webp": encoded(rgb.convert("RGBA"), "WEBP", lossless=True),
    }


PICTURES = picture_files()
LIES = [bytes([value]) * size for value in (0x00, 0x7F, 0x80, 0xFF) for size in (1, 2, 4)]  # huge sizes and counts
SPLICES = st.one_of(st.binary(max_size=8), st.sampled_from(LIES), st.sampled_from(list(PICTURES.values())))


@st.composite
def damaged(draw, files: dict[str, bytes]) -> bytes:
    """One of `files` with some bytes overwritten, deleted, inserted or cut off."""
    data = draw(st.sampled_from(list(files.values())))
    for _ in range(draw(st.integers(1, 4))):
        # Headers are where damage does most.
        at = draw(st.one_of(st.integers(0, min(80, len(data))), st.integers(0, len(data))))
        change = draw(st.sampled_from(["overwrite", "overwrite", "bit", "delete", "insert", "truncate", "reseal"]))
        if change == "overwrite":
            put = draw(SPLICES)[:8]
            data = data[:at] + put + data[at + len(put) :]
        elif change == "bit" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif change == "delete":
            data = data[:at] + data[at + draw(st.integers(1, 16)) :]
        elif change == "insert":
            data = data[:at] + draw(SPLICES) + data[at:]
        elif change == "truncate":
            data = data[:at]
        elif change == "reseal":
            data = resealed(data)
    return resealed(data) if draw(st.booleans()) else data


def resealed(data: bytes) -> bytes:
    """A PNG whose chunks have the checksum of what they now hold, so that damage is not noticed before it is read."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    made, at = data[:8], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4])
        end = at + 8 + size
        if end + 4 > len(data):
            break
        made += data[at:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4)
        at = end + 4
    return made + data[at:]


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """No more than `more` bytes of address space beyond what the process has: MemoryError instead."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.filterwarnings("ignore")  # files.py has a filter of its own, which pytest replaces: see below
@fuzz(100)
@given(data=damaged(PICTURES))
def test_a_damaged_image_is_read_or_unreadable(data, tmp_path, capfd):
    path = tmp_path / "image"
    path.write_bytes(data)
    with contextlib.suppress(UNREADABLE), memory_limit(4 * 2**30):
        image = read_image(path)
        assert image.mode == "RGB" and image.width * image.height > 0
    # libtiff writes its own remarks on damage, and nothing in Pillow stops it.
    assert capfd.readouterr() == ("", "") or data[:2] in (b"II", b"MM")


def test_remarks_of_the_decoder_do_not_reach_the_terminal(tmp_path):
    """Pillow warns that the EXIF data is cut short; the picture is whole."""
    exif = Image.Exif()
    exif[0x010E] = "a bird"
    whole = exif.tobytes()
    image = Image.new("RGB", (8, 8))
    image.save(tmp_path / "image.jpg", exif=whole[:-8])
    code = "from delta_transfer.data.images import *; import sys; print(read_image(Path(sys.argv[1])).size)"
    command = [sys.executable, "-c", code, str(tmp_path / "image.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(8, 8)\n", "")


# --- records ---------------------------------------------------------------------------------------------------------

RIGHT = 100 * 4 / 12  # the accuracy of `predictions_file`
RUNS = [record(method, seed, RIGHT, val_top1=40.0) for method in ("l2", "delta") for seed in range(3)]
METRICS = "".join(
    json.dumps({"step": step, "lr": 0.01, "cross_entropy": 2 / step, "loss": 2 / step, "test_top1": 10.0 * step}) + "\n"
    for step in (1, 2, 3)
)
COMMANDS = [
    *([], ["--format", "csv"], ["--format", "json", "--against", "paper"], ["--format", "markdown", "--per-image"]),
    *(["--per-image", "--baseline", "delta"], ["--format", "latex"], ["--against", "paper"], ["--metric", "val_top1"]),
    *(["--select", "val", "--emit-overrides"], ["--select", "cv"], ["--select", "val", "--format", "json"]),
]
PICTURED = [["--figures", "figures"], ["--format", "html", "--output", "report.html"]]  # as slow as ten of the others
VALUES = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(-2, 10), st.floats(), st.text(max_size=8)),
        st.sampled_from([10**30, 10**400, -1, 1e308, "l2", "delta", "none", "\x1b[31m", "[red]", "$&\\_", "a\nb", "|"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def places(tree: object) -> Iterator[tuple]:
    """The paths of all values in `tree`."""
    yield ()
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield from ((key, *rest) for rest in places(value))


def replaced(tree: object, place: tuple, value: object) -> object:
    return {**tree, place[0]: replaced(tree[place[0]], place[1:], value)} if place else value


def without(tree: dict, place: tuple) -> dict:
    parent = {key: value for key, value in tree.items() if key != place[0]}
    return {**parent, place[0]: without(tree[place[0]], place[1:])} if len(place) > 1 else parent


@st.composite
def wrong_record(draw, good: dict) -> bytes:
    """JSON in which some values are others, or absent."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(good))[1:]))
        good = without(good, place) if draw(st.integers(0, 5)) == 0 else replaced(good, place, draw(VALUES))
    return json.dumps(good).encode()


def predictions_file(**changes) -> bytes:
    rng = np.random.default_rng(0)
    arrays = {"labels": rng.integers(0, 3, 12), "logits": rng.normal(size=(12, 3)), "index": np.arange(12)} | changes
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


WHOLE = {"metrics.jsonl": METRICS.encode(), "predictions.npz": predictions_file()}
ARRAYS = st.sampled_from(
    [np.zeros(0), np.zeros((0, 3)), np.zeros((12, 0)), np.float64(1), np.full((12, 3), np.nan), np.array(["a"] * 12)]
    + [np.full(12, -1), np.full(12, 2**62), np.zeros((12, 3, 1)), np.zeros(12, complex), np.array([None] * 12)]
    + [np.zeros((12, 3), "M8[s]"), np.zeros(12, [("a", int)]), np.zeros((12, 3), bool), np.full((12, 3), "a")]
)  # fmt: skip


@st.composite
def damage(draw) -> tuple[int, str, bytes]:
    """A file of one run and what is in it."""
    run = draw(st.integers(0, len(RUNS) - 1))
    name = draw(st.sampled_from(["summary.json", "summary.json", "summary.json", "metrics.jsonl", "predictions.npz"]))
    kind = draw(st.sampled_from(["bytes", "values", "values"]))
    if kind == "bytes":
        whole = WHOLE.get(name) or json.dumps(RUNS[run]).encode()
        return run, name, draw(damaged({name: whole}))
    if name == "summary.json":
        return run, name, draw(wrong_record(RUNS[run]))
    if name == "metrics.jsonl":
        lines = METRICS.splitlines()
        at = draw(st.integers(0, 2))
        lines[at] = draw(wrong_record(json.loads(lines[at]))).decode()
        return run, name, "\n".join([*lines, ""]).encode()
    return run, name, predictions_file(**{draw(st.sampled_from(["labels", "logits", "index"])): draw(ARRAYS)})


def report_on(folder: Path, damages: list[tuple[int, str, bytes]], options: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of delta-report on RUNS, some of them damaged."""
    for number, made in enumerate(RUNS):
        run = folder / "results" / "runs" / f"run{number}"
        run.mkdir(parents=True)
        for name, data in {"summary.json": json.dumps(made).encode(), **WHOLE}.items():
            (run / name).write_bytes(data)
    for number, name, data in damages:
        (folder / "results" / "runs" / f"run{number}" / name).write_bytes(data)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = report.main(options)
    return status, out.getvalue(), err.getvalue()


@fuzz(50)
@given(
    damages=st.lists(damage(), min_size=1, max_size=2, unique_by=lambda made: made[:2]),
    options=st.sampled_from(COMMANDS),
)
def test_damaged_records_are_named_and_the_others_reported(damages, options):
    check_report(damages, options)


@fuzz(2)
@given(
    damages=st.lists(damage(), min_size=1, max_size=2, unique_by=lambda made: made[:2]),
    options=st.sampled_from(PICTURED),
)
def test_damaged_records_do_not_stop_figures_and_page(damages, options):
    check_report(damages, options)


def check_report(damages: list[tuple[int, str, bytes]], options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        status, out, err = report_on(Path(folder), damages, options)
    assert status in (0, 1)
    assert "Traceback" not in out + err
    for number, name, data in damages:
        if name == "summary.json" and not is_json(data):
            assert f"skipped run{number}: " in err
    if "--select" not in options:
        assert status == 0  # four runs are whole


def is_json(data: bytes) -> bool:
    try:
        return json.loads(data.decode()) is not ...
    except ValueError:
        return False
