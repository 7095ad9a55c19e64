"""Small pictures of the images in a table, from the folder of their data set."""

from base64 import b64encode
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from PIL import Image

from ..common.tables import Table
from ..records.files import MIB, read_regular

SIDE = 96  # pixels of the longer side
LARGEST = 64 * MIB
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # Pillow knows more, and some are programs


def with_thumbnails(table: Table, folder: Path) -> Table:
    """The table with a picture in each cell of its first column, if `folder` has the image of that name."""
    rows = [[replace(row[0], picture=thumbnail(folder, row[0].text)), *row[1:]] for row in table.rows]
    return replace(table, rows=rows)


def thumbnail(folder: Path, name: str) -> str:
    """A small JPEG as a data URI; "" without a readable image of that name in the folder. Names may be anybody's."""
    content = BytesIO()
    try:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            return ""
        with Image.open(BytesIO(read_regular(folder / name, LARGEST)), formats=FORMATS) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            image.thumbnail((SIDE, SIDE))
            image.convert("RGB").save(content, "JPEG", quality=80)
    except Exception:  # a damaged file can make Pillow raise nearly anything
        return ""
    return f"data:image/jpeg;base64,{b64encode(content.getvalue()).decode()}"
