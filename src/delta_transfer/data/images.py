"""Image files: which files are images, and the picture that a viewer shows."""

import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"),
}
# The formats of data sets, whatever a file is called. Pillow knows more formats, and some are programs: Ghostscript
# runs EPS files. MPO, several JPEGs in one file, opens as JPEG.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF")
# Formats that are recognised by suffix alone: TGA has no signature, and JPEG 2000 is rare.
FORMATS_BY_SUFFIX = {".tga": "TGA", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".heic": "HEIF", ".heif": "HEIF"}
# Raw files of cameras are TIFF files too, but what Pillow finds in them is a thumbnail.
RAW_SUFFIXES = {".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"}
UNFINISHED_SUFFIXES = {".part", ".partial", ".crdownload", ".download", ".tmp"}
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"RIFF", b"P")
OF_SEVERAL = (b"GIF8", b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"RIFF")  # formats that may hold more pictures
HEIC_MARKS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
NO_IMAGE, BACKUP = "no image", "an editor's backup copy"
NO_HEIC = "HEIC, which is read after pip install 'delta-transfer[heif]'"
NO_AVIF = "AVIF, which this build of Pillow does not read: pip install -U pillow"
# Pixel modes that mean a picture: converting them to RGB loses nothing of what it shows.
CONVERTIBLE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
# A damaged or hostile image file can make Pillow raise nearly anything: struct.error, MemoryError, ...
UNREADABLE = Exception
# Pillow warns about odd but readable files without naming them: EXIF data cut short, or as many pixels as cameras make
# (it raises from 179 million on). The filter is permanent, since a temporary one is not safe where threads decode.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")


@cache
def heif() -> bool:
    """Whether HEIC files can be read: pillow-heif is installed. Registers it with Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def why_no_image(path: Path) -> str | None:
    """Why a file is not an image, in a few words; None if it is one.

    A suffix of SUFFIXES is trusted. For other files Pillow decides by the first bytes.
    """
    suffix = path.suffix.lower()
    if suffix == ".avif" and not features.check("avif"):
        return NO_AVIF
    if suffix in SUFFIXES:
        return None
    if suffix in RAW_SUFFIXES:
        return "a camera's raw file (convert it to .jpg)"
    if FORMATS_BY_SUFFIX.get(suffix) == "HEIF" and not heif():
        return NO_HEIC
    if suffix in UNFINISHED_SUFFIXES:
        return "an unfinished file"
    if path.name.endswith("~"):
        return BACKUP
    try:
        head = first_bytes(path)
    except OSError:
        return "a file that cannot be read"
    if not head:
        return "an empty file"
    if _is_heic(head):
        return None if heif() else NO_HEIC
    if suffix not in FORMATS_BY_SUFFIX and not head.startswith(SIGNATURES) and head[4:8] != b"ftyp":
        return NO_IMAGE
    try:
        with _open(path):
            return None
    except UNREADABLE:
        return NO_IMAGE


def first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def holds_several_pictures(path: Path) -> bool:
    """Whether a file is an animation or has many pages. `read_image` reads the first picture.

    The previews that cameras put behind a JPEG do not count.
    """
    try:
        head = first_bytes(path)
        if not head.startswith(OF_SEVERAL) and head[4:8] != b"ftyp":
            return False
        with _open(path) as image:
            return bool(getattr(image, "is_animated", False)) and image.format != "HEIF"
    except UNREADABLE:
        return False


def _is_heic(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_MARKS


def _open(path: Path) -> Image.Image:
    """Reads a file's header. Raises UNREADABLE."""
    of_suffix = FORMATS_BY_SUFFIX.get(path.suffix.lower())
    if of_suffix and (of_suffix != "HEIF" or heif()):
        return Image.open(path, formats=(*FORMATS, of_suffix))
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:  # HEIC photographs of a telephone may have been renamed to .jpg
        if _is_heic(first_bytes(path)) and heif():
            return Image.open(path, formats=("HEIF",))
        raise


# --- Pixels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How image files become pictures of 8 bits; `DatasetConfig` describes the options."""

    scale: str | float | None = None  # full | minmax | the value that is shown as white
    max_pixels: int | None = None  # Pillow's limit, 179 million


def read_image(path: Path, reading: Reading = Reading()) -> Image.Image:
    """The picture that a viewer shows, as RGB: turned as EXIF says, transparency on white.

    Pixels of more than 8 bits are scaled as `reading` says. Raises UNREADABLE. In common cases this is a ValueError
    with a plain reason: a file is empty, cut off, too large or not an image, or has more than 8 bits and no scale.
    """
    try:
        with _open(path) as file:
            _check_size(file, reading.max_pixels)
            _check_depth(file, reading.scale)
            file.load()
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError:
        raise ValueError(_what_else(first_bytes(path))) from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels: dataset.max_pixels=N sets another limit"
        ) from None
    except OSError as error:
        if error.errno is not None:
            raise
        cut_off = "truncated" in str(error).lower()
        raise ValueError("the file is cut off" if cut_off else f"the file is damaged ({error})") from None
    if image.mode not in CONVERTIBLE:
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode, reading.scale))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _check_size(image: Image.Image, max_pixels: int | None) -> None:
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than dataset.max_pixels={max_pixels}")


def _check_depth(image: Image.Image, scale: str | float | None) -> None:
    """Pillow keeps the upper 8 bits of 16-bit colours, in which a picture of 12 bits is nearly black."""
    decoders = getattr(image, "tile", ())
    if scale != "full" and image.mode in CONVERTIBLE and any(re.search(";16[BLN]", str(one.args)) for one in decoders):
        raise ValueError("its colours of 16 bits are read with dataset.scale=full only, or have to be converted")


def allow_pixels(max_pixels: int | None) -> None:
    """Increases Pillow's own limit, one for the whole process, if `max_pixels` is above it."""
    if max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, (max_pixels + 1) // 2)


def _what_else(head: bytes) -> str:
    """What a file is that Pillow does not open."""
    if not head:
        return "the file is empty"
    if _is_heic(head):
        return f"it is {NO_HEIC}"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return f"it is {NO_AVIF}"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page or other text, not an image"
    return "it is damaged, or not an image of a format that is read here"


def _eight_bits(values: np.ndarray, mode: str, scale: str | float | None) -> np.ndarray:
    """(H, W) uint8 from grey values of more than 8 bits. Raises ValueError."""
    kind = "floating-point" if mode == "F" else "16-bit" if mode.startswith("I;16") else "32-bit"
    if mode not in ("I", "F") and not mode.startswith("I;16"):
        raise ValueError(f"its pixel mode {mode} has no agreed meaning as a picture")
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError(f"its {kind} pixels are not all finite")
    if scale is None:
        raise ValueError(
            f"its {kind} pixels ({low:g} to {high:g}) need dataset.scale: full, minmax, or the value that is white"
        )
    if scale == "minmax":
        white, values = float(high) - float(low), values.astype(np.float64) - float(low)
    elif scale == "full" and kind == "16-bit":
        return (values >> 8).astype(np.uint8)
    elif scale == "full" and kind == "32-bit":
        raise ValueError("its 32-bit pixels need dataset.scale=minmax, or the value that is white")
    else:
        white = 1.0 if scale == "full" else float(scale)
        if low < 0 or high > white:
            raise ValueError(f"its {kind} pixels ({low:g} to {high:g}) are not in 0..{white:g} (dataset.scale={scale})")
    return np.floor(values * (255.999 / white) if white else values * 0.0).astype(np.uint8)
