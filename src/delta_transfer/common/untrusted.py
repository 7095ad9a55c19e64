"""Rules for all files and names that other people made. This module imports nothing slow."""

GIB = 2**30


def most_unpacked(packed: int) -> int:
    """How many bytes may come out of `packed` bytes. A file that unpacks to more is a decompression bomb.

    Photographs hardly shrink, lists of text shrink by a factor of ten, and zeros by a thousand.
    """
    return max(GIB, 200 * packed)


def no_formula(value: object) -> object:
    """Puts an apostrophe before a text that a spreadsheet would compute. Numbers stay as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
