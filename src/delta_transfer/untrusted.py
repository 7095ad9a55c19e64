"""What holds for all files and names that other people made. Imports nothing that is slow to import."""

GIB = 2**30


def most_unpacked(packed: int) -> int:
    """How many bytes may come out of `packed` bytes: what becomes more is a decompression bomb.

    Photographs hardly shrink, lists of text by a factor of ten. Zeros shrink by a thousand.
    """
    return max(GIB, 200 * packed)


def printable(text: str) -> str:
    """Characters that steer a terminal (all control characters but the line feed) and odd bytes, spelled out."""
    shown = "".join(c if c == "\n" or c.isprintable() or c.isspace() and c > "\x7f" else ascii(c)[1:-1] for c in text)
    return shown.encode("utf-8", "backslashreplace").decode()
