"""delta-export: a finished run's network as a file for other programs.

    delta-export RUN --format safetensors               # the state dict, for torchvision and timm
    delta-export RUN --format onnx --output bird.onnx   # needs pip install 'delta-transfer[export]'
    delta-export RUN --format torch-export              # a .pt2 file, for torch.export.load

RUN is a run's folder (results/runs/...) or its name below results/runs. The file is RUN/export/model.<suffix> unless
--output says where; beside it lies MODEL_CARD.md: data, classes, accuracy, preprocessing, and how to use it. The same
card is in the file's metadata ("model_card", JSON).

safetensors: parameters under the backbone's own names, fp32; normalise images yourself, as the card says.
onnx, torch-export: the input is float RGB in 0..1, (B, 3, H, W), resized and cropped as the card says, any B;
normalisation is inside; the output is logits (B, K), whose softmax is the probabilities.

Before anything is written, the file's outputs are compared with the run's network on a few images (ONNX: if onnxruntime
is installed); if they differ by more than 1e-4 of the largest logit, that is an error, and there is no file. An earlier
export of the same network is replaced, any other file is not.

Exit status: 0 if the file is written; 1 if not; 2 for a wrong command line.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.console import log, stoppable
from ..common.errors import UserError
from ..records.cards import in_words, make_card, metadata_of
from ..records.files import write_atomically

if TYPE_CHECKING:
    from ..inspect.finished import Finished

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
CARD = "MODEL_CARD.md"


@stoppable
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        export(args.run, args.format, args.output)
    except (UserError, OSError) as error:
        log.error(str(error))
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="delta-export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", metavar="RUN", help="a run's folder, or its name below results/runs")
    p.add_argument("--format", choices=list(SUFFIXES), required=True)
    p.add_argument(
        "--output", type=Path, metavar="PATH", help="the file, or a folder for it (default: RUN/export/model.<suffix>)"
    )
    return p


def export(name: str, form: str, output: Path | None) -> None:
    from ..inspect.finished import finished, run_folder  # imports torch
    from ..models.portable import FORMATS, TOLERANCE, Normalised, difference, some_images
    from ..models.zoo import bare_network

    run = finished(run_folder(name))
    path = place(output or run.record["folder"] / "export", SUFFIXES[form])
    card, words = card_of(run, path.stem)
    check_nothing_lost(path, card)

    backbone, weights = run.config.backbone, run.network.weights()
    network = Normalised(bare_network(backbone.name, run.network.classes, weights), backbone.mean, backbone.std).eval()
    make, outputs_of = FORMATS[form]
    images = some_images(3, backbone.image_size)
    batches = images, images[:1]
    try:
        data = make(network, backbone.image_size, metadata_of(card))
        outputs = [outputs_of(data, batch, network, backbone.name) for batch in batches]
    except UserError:
        raise
    except Exception as error:  # an exporter can raise nearly anything about a network that it does not understand
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{backbone.name} cannot be exported as {form}: {reason}. Nothing is written.") from None
    for batch, found in zip(batches, outputs, strict=True):
        expected = run.network((batch - network.mean) / network.std)["logits"]
        if found is not None and not difference(found, expected) <= TOLERANCE:  # NaN is not
            raise UserError(
                f"The {form} file does not compute what the network of {run.run_id} does (logits differ by "
                f"{difference(found, expected):.1e} of the largest; {TOLERANCE:.0e} is tolerated): nothing is written."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    write_atomically(path.parent / CARD, words.encode())
    if found is None:
        log.info(f"{path} was not verified: onnxruntime is not installed (pip install 'delta-transfer[export]')")
    else:
        log.info(f"verified: logits differ from the network's by at most {TOLERANCE:.0e} of the largest")
    log.info(f"written: {path} ({len(data) / 1e6:.1f} MB), {path.parent / CARD}")


def place(output: Path, suffix: str) -> Path:
    """The file that --output means: a name without a suffix is a folder. Raises UserError for another format's."""
    if output.suffix == suffix and not output.is_dir():
        return output
    if output.is_file() or (output.suffix and not output.is_dir()):
        raise UserError(f"--output {output}: a file of this format ends in {suffix}.")
    return output / f"model{suffix}"


def card_of(run: "Finished", stem: str) -> tuple[dict[str, Any], str]:
    """As data and in words, of all formats; `stem`: what the words call the file."""
    from ..experiment.stages import cpu_weights
    from ..models.zoo import NETWORKS, options_for
    from ..records.checked import fingerprint

    weights, name, classes = cpu_weights(run.network), run.config.backbone.name, run.network.classes
    if name in NETWORKS:
        build = f'from delta_transfer.models.zoo import NETWORKS\n\nnetwork = NETWORKS["{name}"]({classes})'
    else:
        options = "".join(f", {key}={value}" for key, value in options_for(name, weights).items())
        call = f'torchvision.models.get_model("{name}", num_classes={classes}{options})'
        build = f"import torchvision\n\nnetwork = {call}"
    try:
        card = make_card(run.record | {"config": asdict(run.config)}, run.class_names, fingerprint(weights))
        return card, in_words(card, USE.format(build=build, side=run.config.backbone.image_size, file=stem))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run.run_id}: its record does not say what a model card needs: {error!r}") from None


def check_nothing_lost(path: Path, card: dict[str, Any]) -> None:
    """Raises UserError rather than replace anything but an earlier export of the same network."""
    if (path.parent / "summary.json").exists():
        raise UserError(f"{path.parent} is a run's folder, with a network of its own: choose another (--output).")
    described = path.parent / CARD
    try:
        words = described.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path.exists():
            raise UserError(f"{path} is there, and no {CARD} says what it is: choose another (--output).") from None
        return
    except ValueError:
        words = ""
    if card["weights_fingerprint"] not in words:
        raise UserError(f"{described} describes another network: choose another folder (--output).")


USE = """## Use

- `.safetensors`: the network's state dict. The input is normalised as above.

```python
from safetensors import safe_open
from safetensors.torch import load_file
{build}
network.load_state_dict(load_file("{file}.safetensors"))
network.eval()
card = safe_open("{file}.safetensors", "pt").metadata()["model_card"]
```

- `.onnx`: input `images`, float RGB in 0..1, (B, 3, {side}, {side}), not normalised; output `logits`, (B, classes).

```python
import onnxruntime

session = onnxruntime.InferenceSession("{file}.onnx")
(logits,) = session.run(["logits"], {{"images": images}})
card = session.get_modelmeta().custom_metadata_map["model_card"]
```

- `.pt2`: the same input and output.

```python
import torch

more = {{"model_card": ""}}
logits = torch.export.load("{file}.pt2", extra_files=more).module()(images)
card = more["model_card"]
```

Probabilities are the softmax of the logits, in the order of `json.loads(card)["classes"]`.
The `.safetensors` file is also a source network for delta-run: `source=path/to/{file}.safetensors`."""


if __name__ == "__main__":
    sys.exit(main())
