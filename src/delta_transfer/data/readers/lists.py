"""Data sets with list files. The configuration says which lists there are and what their lines look like.

    reader: lists
    images: Images                  # folder of the images
    train_list: TrainImages.txt
    test_list: TestImages.txt
    line: "{class}/{file}"          # what a line of the lists looks like

Templates such as `line` hold placeholders. A placeholder reaches up to the character that follows it in the template,
the last one to the end of the line. A blank in a template stands for blanks and tabs, a tab for one tab.

{file}   the image; `path` says where it lies below `images`. Unless it is given, that is the column of `line` that
         holds {file}; columns end at blanks, tabs, commas, semicolons and bars
{class}  the name of its class
{label}  the number of its class; `class_line` says which class has it, else the lines of `classes` count from 0
{id}     the number of the image, by which lines of `joined` lists belong to it
{train}  1 for a training image, 0 for a test image

Other placeholders match text that is not used, unless `path` has them. The name of a list may hold {partition}, and
{class} if each list belongs to one class. A list with a suffix of images (train/{class}/*.jpg) means the images
themselves, below `images`. A list *.json is an object of classes, each with its array of lines.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from ...common.console import shorten_list
from ...common.errors import UserError
from ...common.options import MISSING, OptionError, option
from ..dataset import Dataset
from ..files import from_files, read_lines
from ..images import SUFFIXES
from ..options import DatasetConfig, Publication
from ..registry import reader
from .torchvision_sets import downloader

PLACEHOLDER = re.compile(r"\{(\w+)\}")
NUMBERS = {"id": r"\d+", "label": r"\d+", "train": "[01]"}  # placeholders that are numbers


@dataclass
class ListsConfig(DatasetConfig):
    title: str | None = option(None, "what people call the data set; null means its name", identity=False)
    source: str | None = option(None, "where a person gets it", identity=False)
    archives: list[str] = option([], "the publisher's archives, which delta-data prepare unpacks", identity=False)
    torchvision: str | None = option(None, "torchvision's class that downloads it", identity=False)
    # The fingerprint of the data set covers everything that these decide.
    images: str = option("", "folder of the images below root", identity=False)
    train_list: Any = option(
        MISSING, "list of the training images below root, or several; of all images with {train}", identity=False
    )
    test_list: Any = option(
        None, "list of the test images, or several; null where {train} tells which these are", identity=False
    )
    line: str = option("{class}/{file}", "what a line of a list looks like", identity=False)
    path: str | None = option(None, "where an image lies below images; null means as the line says", identity=False)
    joined: dict[str, str] = option(
        {}, "more lists, each with what its lines look like; {id} says whose they are", identity=False
    )
    classes: str | None = option(
        None, "list of the classes, in their order; null means the training list's, sorted", identity=False
    )
    class_line: str = option("{class}", "what a line of the list of classes looks like", identity=False)
    words: str | None = option(
        None, "list with lines <class><TAB><name>, <other names>; the name is added to the class", identity=False
    )
    partition: int = option(1, "which of several official splits, for the names of lists with {partition}", at_least=1)

    def check(self) -> None:
        super().check()
        in_line = _compiled("line", self.line).groupindex.keys()
        for name, template in self.joined.items():
            both = in_line & _compiled("joined", template).groupindex.keys()
            self.require("id" in both, "joined", f"dataset.joined: {name} and dataset.line need {{id}}.")
        self.require("file" in in_line, "line", f"dataset.line={self.line} has no {{file}}.")
        known = _compiled("path", self.image_path).groupindex.keys()
        self.require(known <= in_line, "path", f"dataset.path={self.image_path} has a placeholder dataset.line lacks.")
        has_class = "class" in _compiled("class_line", self.class_line).groupindex
        self.require(has_class, "class_line", f"dataset.class_line={self.class_line} has no {{class}}.")
        self.require(
            self.train_list == MISSING or self.split_in_lines != bool(self.test_list),
            "test_list",
            "Name the test images by dataset.test_list or by {train} in a line, and not by both.",
        )
        for name, lists in (("train_list", self.train_lists), ("test_list", self.test_lists)):
            for pattern in lists:
                good = isinstance(pattern, str) and pattern and not pattern.startswith("/")
                self.require(bool(good), name, f"dataset.{name}: {pattern!r} is not the name of a list below root.")

    @property
    def split_in_lines(self) -> bool:
        return any("{train}" in template for template in (self.line, *self.joined.values()))

    @property
    def image_path(self) -> str:
        return self.path or next((word for word in re.split(r"[\s,;|]", self.line) if "{file}" in word), "{file}")

    @property
    def train_lists(self) -> list[str]:
        return _several(self.train_list, self.partition)

    @property
    def test_lists(self) -> list[str]:
        return _several(self.test_list, self.partition)

    def publication(self, of_reader: Publication) -> Publication:
        title = self.title or self.name
        patterns = [*self.train_lists, *self.test_lists]
        lists = [pattern for pattern in patterns if not _are_images(pattern)]
        images = [*filter(_are_images, patterns), self.image_path]
        more = [name for name in (*self.joined, self.classes, self.words) if name]
        needs = [*map(_fixed, lists), *more, *(_fixed(f"{self.images}/{path}".lstrip("/")) for path in images)]
        return Publication(
            title,
            tuple(dict.fromkeys(need for need in needs if need)),
            self.source or f"{title} from its publisher",
            tuple(self.archives),
            downloader(self.torchvision) if self.torchvision else None,
        )


def _several(lists: Any, partition: int) -> list[Any]:
    several = lists if isinstance(lists, list) else [] if lists is None else [lists]
    return [name.replace("{partition}", str(partition)) if isinstance(name, str) else name for name in several]


def _are_images(pattern: str) -> bool:
    return PurePosixPath(pattern).suffix.lower() in SUFFIXES


def _fixed(pattern: str) -> str:
    """The file, or the folder above the first name with a placeholder or a star."""
    parts = PurePosixPath(pattern).parts
    changing = [number for number, part in enumerate(parts) if re.search(r"[{*?\[]", part)]
    return "/".join(parts[: changing[0]] if changing else parts)


def _compiled(key: str, template: str) -> re.Pattern[str]:
    """The regular expression of a template: see the module's text. Raises OptionError for one that has none."""
    literal, *rest = re.split(PLACEHOLDER, template)
    pattern = _literal(literal)
    for name, literal in zip(rest[::2], rest[1::2], strict=True):
        text = ".+" if not literal else r"\S+" if literal[0] == " " else f"[^{re.escape(literal[0])}]+"
        pattern += f"(?P<{name}>{NUMBERS.get(name, text)}){_literal(literal)}"
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(f"dataset.{key}", f"dataset.{key}={template} is not a template: {error}.") from error


def _filled(template: str, fields: Mapping[str, str]) -> str:
    pieces = re.split(PLACEHOLDER, template)
    pieces[1::2] = [fields[name] for name in pieces[1::2]]
    return "".join(pieces)


def _literal(text: str) -> str:
    return r"\s+".join(re.escape(word) for word in text.split(" "))


@dataclass(frozen=True)
class _Image:
    place: str  # where it is listed, for messages
    file: str  # path below `images`
    fields: Mapping[str, str]  # its known values, by placeholder

    @property
    def test(self) -> bool:
        return self.fields.get("train") == "0"

    def joined_with(self, more: Mapping[str, str]) -> "_Image":
        """Raises UserError if `more` contradicts the known values."""
        if wrong := [name for name in self.fields.keys() & more.keys() if self.fields[name] != more[name]]:
            name = wrong[0]
            raise UserError(f"{self.place}: its {name} is {self.fields[name]}, and by another list {more[name]}.")
        return _Image(self.place, self.file, {**self.fields, **more})


@reader("lists", title="A data set with list files", options=ListsConfig)
def lists(root: Path, config: ListsConfig) -> Dataset:
    """Reads the lists: training images first, then test images; class by class if each list belongs to one class.

    Raises UserError for a line that does not look like its template, lists that contradict each other or name other
    classes, a class without a training image, and what `from_files` finds.
    """
    patterns = [*config.train_lists, *config.test_lists]
    listed = _listed_classes(root, config) if config.classes else None
    names = list(listed) if listed else _classes_of_names(root, config, patterns)
    images = [image for pattern in config.train_lists for image in _images(root, config, pattern, names, "1")]
    images += [image for pattern in config.test_lists for image in _images(root, config, pattern, names, "0")]
    for name, template in config.joined.items():
        images = _joined(root / name, template, images)

    numbers = listed or _classes_of_images(images)
    labels = _labels(images, numbers, config.classes or ", ".join(config.train_lists))
    classes, trained = list(numbers), {label for label, image in zip(labels, images, strict=True) if not image.test}
    if empty := [name for label, name in enumerate(classes) if label not in trained]:
        raise UserError(
            f"{len(empty)} classes of {config.name} have no training image in {root}: {shorten_list(empty)}."
        )
    order = list(range(len(images)))
    if all("{class}" in pattern for pattern in patterns):
        order.sort(key=labels.__getitem__)
    return from_files(
        config.name,
        root / config.images,
        _with_words(root / config.words, classes) if config.words else classes,
        [images[index].file for index in order],
        [labels[index] for index in order],
        [images[index].test for index in order],
        listed_in=" and ".join(patterns),
    )


def _parsed(path: Path, key: str, template: str) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """Yields the place of each line, its placeholders, and what else is known of it."""
    pattern = _compiled(key, template)
    for number, (line, known) in enumerate(_lines(path), start=1):
        match = pattern.fullmatch(line.replace("\\", "/"))  # Windows' separator of folders
        if match is None:
            raise UserError(f"{path}, entry {number}: expected {template!r}, found {line!r}.")
        yield f"{path}, entry {number}", match.groupdict(), known


def _lines(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    if path.suffix != ".json":
        yield from ((line, {}) for line in read_lines(path))
        return
    try:
        for name, lines in json.loads(path.read_text(encoding="utf-8")).items():
            yield from ((str.strip(line), {"class": name}) for line in lines)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON object of classes with their images: {error}.") from error


def _images(root: Path, config: ListsConfig, pattern: str, classes: Sequence[str], train: str) -> Iterator[_Image]:
    """Yields the images in the lists called `pattern`. train: "1" or "0", unless the lines tell."""
    split = {} if config.split_in_lines else {"train": train}
    image_path = config.image_path
    for name in classes if "{class}" in pattern else [None]:
        known = split if name is None else split | {"class": name}
        if _are_images(pattern):
            folder = root / config.images
            for path in sorted(folder.glob(pattern.replace("{class}", escape(name or "")))):
                if not path.name.startswith("."):
                    yield _Image(str(path), path.relative_to(folder).as_posix(), known)
            continue
        for place, fields, more in _parsed(root / pattern.replace("{class}", name or ""), "line", config.line):
            yield _Image(place, _filled(image_path, fields), known).joined_with(more).joined_with(fields)


def _joined(path: Path, template: str, images: Sequence[_Image]) -> list[_Image]:
    """Adds the values of one more list to the images. Ids that no image has are skipped."""
    lines = {fields["id"]: fields for _, fields, _ in _parsed(path, "joined", template)}
    ids = [image.fields.get("id", image.file) for image in images]
    if unlisted := [number for number in ids if number not in lines]:
        raise UserError(f"{path} has no line for the image ids {shorten_list(unlisted)}.")
    return [image.joined_with(lines[number]) for number, image in zip(ids, images, strict=True)]


def _listed_classes(root: Path, config: ListsConfig) -> dict[str, int]:
    """The number of each class in the list of classes, in the order of the numbers."""
    path = root / str(config.classes)
    lines = [fields for _, fields, _ in _parsed(path, "class_line", config.class_line)]
    numbers = {fields["class"]: int(fields.get("label", line)) for line, fields in enumerate(lines)}
    if len(set(numbers.values())) < len(lines):
        raise UserError(f"{path} names a class twice.")
    return dict(sorted(numbers.items(), key=lambda entry: entry[1]))


def _classes_of_names(root: Path, config: ListsConfig, patterns: Sequence[str]) -> list[str]:
    """The classes that have lists of their own. Each needs one for training and one for testing."""
    found: dict[str, set[str]] = {}
    for pattern in patterns:
        if "{class}" in pattern:
            folder = root / config.images if _are_images(pattern) else root
            name = re.compile(re.escape(pattern).replace(r"\{class\}", "([^/.][^/]*)", 1).replace(r"\*", "[^/]*"))
            paths = (path.relative_to(folder).as_posix() for path in folder.glob(pattern.replace("{class}", "*")))
            found[pattern] = {match[1] for path in paths if (match := name.fullmatch(path))}
    classes = set().union(*found.values())
    if found and not classes:
        raise UserError(f"{root} holds no list {' and no list '.join(found)}.")
    absent = [pattern.replace("{class}", name) for pattern, of in found.items() for name in sorted(classes - of)]
    if absent:
        raise UserError(f"{root} lacks {shorten_list(absent)}: each class needs a list of both splits.")
    return sorted(classes)


def _classes_of_images(images: Sequence[_Image]) -> dict[str, int]:
    """The number of each class of the training images, from the lines or from the order of the names."""
    trained = [image for image in images if not image.test]
    if all("label" in image.fields for image in trained):
        numbers = {_class(image): int(image.fields["label"]) for image in trained}
        return dict(sorted(numbers.items(), key=lambda entry: entry[1]))
    return {name: number for number, name in enumerate(sorted(set(map(_class, trained))))}


def _class(image: _Image) -> str:
    """The name of an image's class, or its number if the name is unknown."""
    name = image.fields.get("class") or image.fields.get("label")
    if name is None:
        raise UserError(f"{image.place}: nothing tells the class (dataset.line has neither {{class}} nor {{label}}).")
    return name


def _labels(images: Sequence[_Image], numbers: Mapping[str, int], listed_in: str) -> list[int]:
    """The label of each image: the place of its class among `numbers`, which `listed_in` lists."""
    label_of = {name: label for label, name in enumerate(numbers)}
    class_of = {number: name for name, number in numbers.items()}
    labels, mixed = [], []
    for image in images:
        name = _class(image)
        if "label" in image.fields:
            known = class_of.get(int(image.fields["label"]))
            if known is None:
                raise UserError(f"{image.place}: {listed_in} has no class {image.fields['label']}.")
            if image.fields.get("class", known) != known:
                mixed.append(f"{image.file} has the class {known}")
            name = known
        if name not in label_of:
            raise UserError(f"{image.place}: {listed_in} has no class {name}.")
        labels.append(label_of[name])
    if mixed:
        raise UserError(
            f"The lists do not belong together: in {listed_in}, {len(mixed)} of {len(images)} images do not have the "
            f"class of their folder: {shorten_list(mixed)}. Take all lists from one copy of the data set."
        )
    return labels


def _with_words(path: Path, classes: Sequence[str]) -> list[str]:
    """E.g. "n01443537 goldfish" where the list says "n01443537<TAB>goldfish, Carassius auratus"."""
    words = dict(line.split("\t", maxsplit=1) for line in read_lines(path) if "\t" in line)
    return [f"{name} {words.get(name, '').split(',')[0]}".strip() for name in classes]
