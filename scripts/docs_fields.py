"""For mkdocstrings: the comment behind a field of a dataclass is its documentation."""

import re

from griffe import Attribute, Docstring, Extension


class CommentedFields(Extension):
    def on_attribute(self, *, attr: Attribute, **_) -> None:
        line = attr.lines_collection[attr.filepath][attr.lineno - 1] if attr.lineno else ""
        comment = re.search(r"  # (.*)", line)
        if attr.docstring is None and comment:
            attr.docstring = Docstring(comment[1], parent=attr)
