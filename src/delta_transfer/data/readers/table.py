"""The table of data sets: how each is read, what its publisher's layout is, where a person gets it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...config import DatasetConfig, DrawnConfig, DTDConfig, FolderConfig, GlyphPairsConfig, GlyphsConfig, LFWConfig
from ..dataset import Dataset
from ..embedded.glyph_pairs import glyph_pairs
from ..embedded.glyphs import glyphs
from .caltech import caltech101, caltech256, download_caltech256
from .cub import cub
from .dogs import dogs
from .folder import folder
from .lfw import lfw
from .mit67 import mit67
from .stanford40 import stanford40
from .tiny_imagenet import tiny_imagenet
from .torchvision_sets import aircraft, cars, cifar10, cifar100, downloader, dtd, flowers102, food101, pets, stl10


@dataclass(frozen=True)
class Reader:
    """How one data set is read. `read(root, config)` may rely on `needs` being there."""

    read: Callable[[Path | None, DatasetConfig], Dataset]
    title: str
    needs: tuple[str, ...] = ()  # what lies below dataset.root in the publisher's layout
    source: str = ""  # where a person gets it
    archives: tuple[str, ...] = ()  # the publisher's archives, which delta-data prepare unpacks
    download: Callable[[Path], None] | None = None  # torchvision's download into dataset.root
    schema: type[DatasetConfig] = DatasetConfig  # the options it reads


def _glyphs(root: None, config) -> Dataset:
    return glyphs(config.scripts, config.train_per_class, config.test_per_class, config.render_size, config.render_seed)


_CALTECH256 = {
    "needs": ("256_ObjectCategories",),
    "source": "256_ObjectCategories.tar (1.2 GB) from https://data.caltech.edu/records/nyy15-4j048",
    "archives": ("256_ObjectCategories.tar",),
    "download": download_caltech256,
    "schema": DrawnConfig,
}

# dataset.name -> how it is read.
DATASETS = {
    "glyphs": Reader(_glyphs, "letters drawn with the fonts that come with matplotlib", schema=GlyphsConfig),
    "glyph_pairs": Reader(glyph_pairs, "the same letters in pairs: one letter or two?", schema=GlyphPairsConfig),
    "lfw": Reader(
        lfw,
        "Labeled Faces in the Wild",
        needs=("pairs.txt", "lfw"),
        source="lfw.tgz and pairs.txt of http://vis-www.cs.umass.edu/lfw/ (or from a mirror, when it is not reachable)",
        archives=("lfw.tgz",),
        schema=LFWConfig,
    ),
    "cub": Reader(
        cub,
        "CUB-200-2011",
        needs=("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "images"),
        source="CUB_200_2011.tgz (1.1 GB) from https://data.caltech.edu/records/65de6-vp158",
        archives=("CUB_200_2011.tgz",),
    ),
    "mit67": Reader(
        mit67,
        "MIT Indoor 67",
        needs=("TrainImages.txt", "TestImages.txt", "Images"),
        source="indoorCVPR_09.tar, TrainImages.txt and TestImages.txt from "
        "https://web.mit.edu/torralba/www/indoor.html",
        archives=("indoorCVPR_09.tar",),
    ),
    "dogs": Reader(
        dogs,
        "Stanford Dogs",
        needs=("train_list.mat", "test_list.mat", "Images"),
        source="images.tar and lists.tar from http://vision.stanford.edu/aditya86/ImageNetDogs/",
        archives=("images.tar", "lists.tar"),
    ),
    "caltech256_30": Reader(caltech256, "Caltech-256-30", **_CALTECH256),
    "caltech256_60": Reader(caltech256, "Caltech-256-60", **_CALTECH256),
    "caltech101": Reader(
        caltech101,
        "Caltech-101",
        needs=("caltech101/101_ObjectCategories",),
        source="caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02 (101_ObjectCategories in a folder "
        "caltech101)",
        download=downloader("Caltech101"),
        schema=DrawnConfig,
    ),
    "stanford40": Reader(
        stanford40,
        "Stanford-40",
        needs=("ImageSplits", "JPEGImages"),
        source="Stanford40_JPEGImages.zip and Stanford40_ImageSplits.zip from "
        "http://vision.stanford.edu/Datasets/40actions.html",
        archives=("Stanford40_JPEGImages.zip", "Stanford40_ImageSplits.zip"),
    ),
    "tiny_imagenet": Reader(
        tiny_imagenet,
        "Tiny-ImageNet-200",
        needs=("wnids.txt", "words.txt", "train", "val/val_annotations.txt", "val/images"),
        source="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        archives=("tiny-imagenet-200.zip",),
    ),
    "food101": Reader(
        food101,
        "Food-101",
        needs=("food-101/meta", "food-101/images"),
        source="food-101.tar.gz (5 GB) from https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        download=downloader("Food101"),
    ),
    "cifar10": Reader(
        cifar10,
        "CIFAR-10",
        needs=("cifar-10-batches-py/batches.meta", "cifar-10-batches-py/test_batch"),
        source="cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        download=downloader("CIFAR10"),
    ),
    "cifar100": Reader(
        cifar100,
        "CIFAR-100",
        needs=("cifar-100-python/meta", "cifar-100-python/test"),
        source="cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        download=downloader("CIFAR100"),
    ),
    "dtd": Reader(
        dtd,
        "Describable Textures (DTD)",
        needs=("dtd/dtd/labels", "dtd/dtd/images"),
        source="dtd-r1.0.1.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        download=downloader("DTD"),
        schema=DTDConfig,
    ),
    "aircraft": Reader(
        aircraft,
        "FGVC-Aircraft",
        needs=("fgvc-aircraft-2013b/data/variants.txt", "fgvc-aircraft-2013b/data/images"),
        source="fgvc-aircraft-2013b.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        download=downloader("FGVCAircraft"),
    ),
    "pets": Reader(
        pets,
        "Oxford-IIIT Pets",
        needs=("oxford-iiit-pet/annotations", "oxford-iiit-pet/images"),
        source="images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/",
        download=downloader("OxfordIIITPet"),
    ),
    "cars": Reader(
        cars,
        "Stanford Cars",
        needs=(
            "stanford_cars/devkit/cars_train_annos.mat",
            "stanford_cars/cars_test_annos_withlabels.mat",
            "stanford_cars/cars_train",
            "stanford_cars/cars_test",
        ),
        source="cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat from a mirror "
        "(ai.stanford.edu no longer serves them) into a folder stanford_cars",
        archives=("stanford_cars/cars_train.tgz", "stanford_cars/cars_test.tgz", "stanford_cars/car_devkit.tgz"),
    ),
    "flowers102": Reader(
        flowers102,
        "Flowers-102",
        needs=("flowers-102/imagelabels.mat", "flowers-102/setid.mat", "flowers-102/jpg"),
        source="102flowers.tgz, imagelabels.mat and setid.mat from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        download=downloader("Flowers102"),
    ),
    "stl10": Reader(
        stl10,
        "STL-10",
        needs=("stl10_binary/class_names.txt", "stl10_binary/train_X.bin", "stl10_binary/test_X.bin"),
        source="stl10_binary.tar.gz (2.6 GB) from https://cs.stanford.edu/~acoates/stl10/",
        download=downloader("STL10"),
    ),
    "folder": Reader(
        folder, "A folder of images", source="images of your own, a folder for each class", schema=FolderConfig
    ),
}
