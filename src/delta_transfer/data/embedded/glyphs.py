"""An embedded data set: letters that are drawn on the fly with the fonts of matplotlib. Nothing is downloaded.

A source task (Latin, Greek, Cyrillic and five other scripts) and a target task in a script that the source never saw
(Georgian) make a transfer experiment that fits into minutes of one CPU core. As in photographs, many properties of an
image tell nothing about its class: face, colour, pose, stray strokes, blur, noise.

    source = glyphs(("latin", "greek", "cyrillic"), 80, 20, size=36, seed=0)
    target = glyphs(("georgian",), 10, 30, size=36, seed=0)
"""

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from ...common.errors import UserError
from ...common.options import LARGEST_BATCH, LARGEST_SIDE, MISSING, option
from ..dataset import Dataset
from ..options import EmbeddedConfig
from ..registry import reader

RENDERER = 1  # part of the fingerprint: raise it with every change below that moves a pixel or a label

SCRIPTS = {
    "latin": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
    "greek": "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩαβγδεζηθικλμνξοπρςστυφχψω",
    "cyrillic": "АБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯабвгдежзийклмнопрстуфхцчшщъыьэюя",
    "georgian": "".join(map(chr, range(0x10D0, 0x10F1))),  # modern Mkhedruli, which has no capitals
    "armenian": "".join(map(chr, (*range(0x531, 0x557), *range(0x561, 0x588)))),
    "hebrew": "".join(map(chr, range(0x5D0, 0x5EB))),
    "arabic": "".join(map(chr, (*range(0x621, 0x63B), *range(0x641, 0x64B)))),  # isolated forms
    "nko": "".join(map(chr, range(0x7CA, 0x7E8))),
    "lao": "ກຂຄງຈຊຍດຕຖທນບປຜຝພຟມຢຣລວສຫອຮ",
    "tifinagh": "".join(map(chr, range(0x2D30, 0x2D66))),
}

# Upright and slanted faces. True italics stay out: Cyrillic te, pe, i turn into the shapes of m, n, u there.
# matplotlib's other fonts hold symbols, or pretend to know every character (LastResort).
REGULAR_FACES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneral", "STIXGeneralBol"),
)

MIN_SIZE = 8  # pixels; below this no letter is left to recognise


@dataclass
class GlyphsConfig(EmbeddedConfig):
    scripts: list[str] = option(MISSING, "alphabets whose letters are the classes")
    train_per_class: int = option(MISSING, "training images of each letter", at_least=1, at_most=LARGEST_BATCH)
    test_per_class: int = option(MISSING, "test images of each letter", at_least=1, at_most=LARGEST_BATCH)
    render_size: int = option(
        MISSING, "pixels of the rendered image, before backbone.resize", at_least=MIN_SIZE, at_most=LARGEST_SIDE
    )
    render_seed: int = option(0, "seed of the rendering", at_least=0)


@reader("glyphs", title="letters drawn with the fonts that come with matplotlib", options=GlyphsConfig)
def read_glyphs(root: None, config: GlyphsConfig) -> Dataset:
    return glyphs(config.scripts, config.train_per_class, config.test_per_class, config.render_size, config.render_seed)


def glyphs(scripts: Sequence[str], train_per_class: int, test_per_class: int, size: int, seed: int) -> Dataset:
    """Letters of `scripts` as `size` x `size` RGB images, balanced over the classes, test images first.

    A class is one letter shape: characters that look the same once their size is ignored (Latin A, Greek
    Alpha, Cyrillic A; also c and C) share a class, see `letter_shapes`. Image n of a split depends only on
    scripts, size, seed, split and n: a larger training set keeps the test images and its earlier images.
    """
    if unknown := [script for script in scripts if script not in SCRIPTS]:
        raise UserError(f"glyphs: unknown script {unknown[0]!r}; known are {', '.join(SCRIPTS)}.")
    if not scripts or len(set(scripts)) < len(scripts):
        raise UserError(f"glyphs: scripts must name one script or more, none twice, got {list(scripts)}.")
    shapes = letter_shapes("".join(SCRIPTS[s] for s in scripts))
    plan = _Plan(tuple(scripts), shapes, test_per_class * len(shapes), size, seed)

    # Letters take turns within a split, so image n shows letter n mod K.
    per_split = (test_per_class, train_per_class)
    labels = np.concatenate([np.tile(np.arange(len(shapes), dtype=np.int64), n) for n in per_split])
    names = tuple(
        f"{split}/u{ord(shape[0]):04x}-{number:04d}"
        for split, count in zip(("test", "train"), per_split, strict=True)
        for number in range(count)
        for shape in shapes
    )
    return Dataset(
        name="glyphs-" + "-".join(scripts),
        classes=shapes,
        labels=labels,
        is_test=np.arange(len(labels)) < plan.n_test,
        names=names,
        load=partial(_draw, plan),
        listing=_fingerprint(plan, train_per_class, test_per_class),
    )


# -------------------------------------------------------------------------------------------- classes


@cache
def letter_shapes(characters: str) -> tuple[str, ...]:
    """Group characters into classes; each class is the string of the characters that share it.

    Two characters look alike in a face if, with both bounding boxes scaled to the same square, no ink of
    either is further than 3/64 of the square (about half a stroke) from ink of the other, and the aspect
    ratios of the boxes differ by less than a factor exp(1/4). It is enough to look alike in one regular face.
    Characters that look like the same third character share its class.
    """
    group = {c: {c} for c in characters}
    for face in REGULAR_FACES:
        present = [c for c in characters if _covers(face, c)]
        for a, b in _lookalikes(face, present):
            merged = group[a] | group[b]
            group |= dict.fromkeys(merged, merged)
    return tuple(dict.fromkeys("".join(sorted(group[c], key=characters.index)) for c in characters))


def _lookalikes(face: str, characters: list[str], grid: int = 64, reach: int = 3) -> list[tuple[str, str]]:
    ink, far, aspect = [], [], []
    for c in characters:
        solid = _stencil(face, c, 96).point(_binary)
        solid = solid.crop(solid.getbbox())
        aspect.append(np.log(solid.width / solid.height))
        box = solid.resize((grid, grid), Image.Resampling.BOX).point(_binary)
        ink.append(np.asarray(box).ravel() > 0)
        far.append(np.asarray(box.filter(ImageFilter.BoxBlur(reach))).ravel() == 0)  # no ink within reach
    stray = np.array(ink, np.float32) @ np.array(far, np.float32).T  # pixels of a that lie far from b
    unlike = np.abs(np.subtract.outer(aspect, aspect)) >= 0.25
    pairs = np.argwhere(np.triu((stray + stray.T == 0) & ~unlike, k=1))
    return [(characters[a], characters[b]) for a, b in pairs]


def _binary(level: int) -> int:
    return 255 if level > 127 else 0


# ---------------------------------------------------------------------------------------------- fonts


def _font_file(face: str) -> Path:
    import matplotlib  # slow to import, and only this data set needs it

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


@cache
def _charmap(face: str) -> frozenset[int]:
    from fontTools.ttLib import TTFont

    with TTFont(_font_file(face), lazy=True) as font:
        return frozenset(font.getBestCmap())


def _covers(face: str, character: str) -> bool:
    return ord(character) in _charmap(face)


@cache
def _font(face: str, em: int) -> ImageFont.FreeTypeFont:
    # BASIC: the same outlines whether or not this Pillow was built with the Raqm shaper.
    return ImageFont.truetype(_font_file(face), em, layout_engine=ImageFont.Layout.BASIC)


@cache
def _faces(character: str) -> tuple[str, ...]:
    """The faces that really hold the character, rather than a box in its place."""
    return tuple(face for face in FACES if _covers(face, character))


_freetype = Lock()  # font objects are shared between loader threads


@cache
def _stencil(face: str, character: str, em: int) -> Image.Image:
    """The letter's coverage (0..255), cropped to its ink; kept, so that drawing is a single resampling."""
    with _freetype:
        mask = _font(face, em).getmask(character, mode="L")
        image = Image.frombytes("L", mask.size, bytes(mask))
    return image.crop(image.getbbox())


# -------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class _Plan:
    scripts: tuple[str, ...]
    shapes: tuple[str, ...]
    n_test: int
    size: int
    seed: int

    def locate(self, i: int) -> tuple[str, int]:
        return ("test", i) if i < self.n_test else ("train", i - self.n_test)


def _draw(plan: _Plan, i: int) -> Image.Image:
    """Background, stray strokes, letter, blur, noise; each choice from the generator of image i."""
    split, n = plan.locate(i)
    stream = zlib.crc32(f"{'+'.join(plan.scripts)}/{split}".encode())
    rng = np.random.default_rng((plan.seed, stream, n))
    shape = plan.shapes[n % len(plan.shapes)]

    paper, ink, clutter = _colours(rng)  # (3, 1, 1) each: NumPy is faster with the channels first
    canvas = paper + _gradient(rng, plan.size)
    canvas += _strokes(rng, plan.size, count=int(rng.integers(1, 4))) * (clutter - canvas)
    canvas += _letter(rng, plan.size, shape) * (ink - canvas)
    canvas += _strokes(rng, plan.size, count=int(rng.integers(0, 2))) * (clutter - canvas)
    canvas += rng.uniform(2, 18) * rng.standard_normal(canvas.shape, dtype=np.float32)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _colours(rng: np.random.Generator) -> np.ndarray:
    """Light paper, dark ink, and clutter of any colour, (3, 3, 1, 1)."""
    low, high = np.array([(140, 0, 0)]).T, np.array([(255, 115, 255)]).T
    return rng.uniform(low, high, (3, 3)).astype(np.float32)[:, :, None, None]


def _gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    right, down = rng.uniform(-15, 15, 2).astype(np.float32)
    return right * ramp[None, :] + down * ramp[:, None]


def _letter(rng: np.random.Generator, size: int, shape: str) -> np.ndarray:
    """Coverage of a rotated, sheared, stretched letter that lies wholly inside the image."""
    character = shape[rng.integers(len(shape))]
    faces = _faces(character)
    stencil = _stencil(faces[rng.integers(len(faces))], character, size * 3 // 2)

    # Rotation times (stretch, shear; 0, 1/stretch) has the determinant 1, so that the inverse is simple.
    angle, shear, stretch = rng.uniform(-1, 1, 3) * (0.35, 0.25, 0.18)
    cos, sin, stretch = math.cos(angle), math.sin(angle), math.exp(stretch)
    a, b = cos * stretch, cos * shear - sin / stretch
    c, d = sin * stretch, sin * shear + cos / stretch

    w, h = stencil.width / 2, stencil.height / 2
    half = (abs(a) * w + abs(b) * h, abs(c) * w + abs(d) * h)  # half the extent of the turned letter
    scale = rng.uniform(0.52, 0.78) * size / (2 * max(half))  # size does not tell the class: see letter_shapes
    margin = size / 18  # 2 pixels in 36, as many as a centre crop to 32 takes
    x, y = (size / 2 + rng.uniform(-1, 1) * (size / 2 - margin - scale * extent) for extent in half)

    a, b, c, d = d / scale, -b / scale, -c / scale, a / scale  # from image to stencil: what Pillow asks for
    affine = (a, b, w - a * x - b * y, c, d, h - c * x - d * y)
    mask = stencil.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        mask = mask.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 0.9) * size / 36))
    return np.asarray(mask, np.float32) / 255


def _strokes(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Coverage of `count` random lines and arcs, thinner than a letter's stem."""
    if count == 0:
        return np.zeros((size, size), np.float32)
    double = Image.new("L", (2 * size, 2 * size))  # drawn twice as large and averaged down: smooth edges
    pen = ImageDraw.Draw(double)
    for _ in range(count):
        width = int(rng.integers(2, 5)) * size // 36 or 1
        x0, y0, x1, y1 = rng.uniform(-0.2, 2.2, 4) * size
        if rng.random() < 0.5:
            pen.line((x0, y0, x1, y1), fill=255, width=width)
        else:
            box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
            start = rng.uniform(0, 360)
            pen.arc(box, start, start + rng.uniform(60, 240), fill=255, width=width)
    return np.asarray(double.reduce(2), np.float32) / 255


# ---------------------------------------------------------------------------------------- fingerprint


def _fingerprint(plan: _Plan, train_per_class: int, test_per_class: int) -> str:
    """Digest of all that decides the pixels: arguments, this renderer, the libraries that it draws with, the fonts."""
    facts = {
        "scripts": plan.scripts,
        "classes": plan.shapes,
        "train_per_class": train_per_class,
        "test_per_class": test_per_class,
        "size": plan.size,
        "seed": plan.seed,
        "renderer": RENDERER,
        "pillow": Image.__version__,
        "freetype": features.version("freetype2"),
        "numpy": np.__version__,
        "fonts": _font_digests(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@cache
def _font_digests() -> dict[str, str]:
    return {face: hashlib.sha256(_font_file(face).read_bytes()).hexdigest() for face in FACES}
