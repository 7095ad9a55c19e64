"""What holds for all files and names that other people made. Imports nothing that is slow to import."""

GIB = 2**30


def most_unpacked(packed: int) -> int:
    """How many bytes may come out of `packed` bytes: what becomes more is a decompression bomb.

    Photographs hardly shrink, lists of text by a factor of ten. Zeros shrink by a thousand.
    """
    return max(GIB, 200 * packed)


def spelled_out(text: str, keep: str = "") -> str:
    """With what steers a terminal or the direction of writing as escape sequences (\\x1b, \\u202e).

    So are the bytes of file names that are not UTF-8, which no file or figure takes.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def printable(text: str) -> str:
    """A message, of one line or several, as any terminal can show it."""
    return spelled_out(text.expandtabs(4), keep="\n")


def no_formula(value: object) -> object:
    """Texts that a spreadsheet would compute get its mark of a text in front; numbers are left as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
