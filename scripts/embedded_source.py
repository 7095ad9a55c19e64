"""Makes the source network of the embedded data, which comes with the package, from a run of delta-pretrain.

    OMP_NUM_THREADS=1 delta-pretrain
    python scripts/embedded_source.py results/pretrained/runs/RUN

The weights are rounded to fp16. The card has the accuracy and the fingerprint of the rounded network.
"""

import sys
from pathlib import Path

from torch import Tensor

from delta_transfer.inspect.replay import Replay, replay
from delta_transfer.models.zoo import bare_network, weights_file
from delta_transfer.records.cards import in_words, make_card, metadata_of
from delta_transfer.records.checked import fingerprint, load_trained, save_with_checksum
from delta_transfer.records.run_directory import class_names

USE = """Letters of Latin, Greek, Cyrillic, Hebrew, Arabic, N'Ko, Lao and Tifinagh, drawn with the fonts that come with
matplotlib; test images are other drawings of the same letters. `delta-pretrain` computed with one thread
(`OMP_NUM_THREADS=1`) for 19 minutes. With other versions, another processor or another number of threads it makes
another network. The weights were rounded to fp16 (`scripts/embedded_source.py`); the accuracy and the fingerprint are
those of the rounded network, in fp32. `backbone.weights=glyphs` is this network."""


def accuracy(run: Replay, weights: dict[str, Tensor]) -> float:
    """Top-1 accuracy, in per cent, of the run's network with other weights on the run's test images."""
    network = bare_network(run.config.backbone, len(run.dataset.classes), weights)
    batches = run.images(run.splits.test)
    found = [label for images in batches for label in network(images.cpu()).argmax(dim=1).tolist()]
    return 100 * float((found == run.dataset.labels[run.splits.test]).mean())


def main(folder: Path) -> None:
    run = replay(folder)
    trained = load_trained(folder, run.record)
    stored = {name: value.half() if value.is_floating_point() else value for name, value in trained.items()}
    rounded = {name: value.float() if value.is_floating_point() else value for name, value in stored.items()}
    measured = run.record | {"test_top1": accuracy(run, rounded)}
    card = make_card(measured, class_names(run.record), fingerprint(rounded))
    path = weights_file("glyphs")
    assert path is not None
    path.write_bytes(save_with_checksum(stored, metadata_of(card)))
    path.with_suffix(".md").write_text(in_words(card, USE), encoding="utf-8")
    print(f"{run.record['test_top1']:.2f} % in fp32, {measured['test_top1']:.2f} % rounded: {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
