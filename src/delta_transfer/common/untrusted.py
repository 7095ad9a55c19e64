"""Rules for all files and names that other people made. This module imports nothing slow."""

GIB = 2**30


def most_unpacked(packed: int) -> int:
    """How many bytes may come out of `packed` bytes. A file that unpacks to more is a decompression bomb.

    Photographs hardly shrink, lists of text shrink by a factor of ten, and zeros by a thousand.
    """
    return max(GIB, 200 * packed)


def spelled_out(text: str, keep: str = "") -> str:
    """`text` with escape sequences (\\x1b, \\u202e) for characters that steer a terminal or the writing direction.

    Bytes of file names that are not UTF-8, which no file or figure takes, become escape sequences too.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def printable(text: str) -> str:
    """A message of one or several lines that any terminal can show."""
    return spelled_out(text.expandtabs(4), keep="\n")


def no_formula(value: object) -> object:
    """Puts an apostrophe before a text that a spreadsheet would compute. Numbers stay as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
