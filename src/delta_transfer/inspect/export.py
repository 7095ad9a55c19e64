"""A finished run's network as the bytes of a file for other programs, with its model card."""

from typing import Any

from safetensors.torch import load
from torch import Tensor

from ..common.errors import UserError
from ..common.options import require
from ..data.graphs import chains
from ..models.portable import (
    FORMATS,
    TOLERANCE,
    Normalised,
    bare_network,
    difference,
    file_of,
    options_for,
    some_images,
)
from ..models.zoo import NETWORKS
from ..records.cards import in_words, make_card
from ..records.checked import fingerprint
from .finished import Finished


def exported(run: Finished, form: str, metadata: dict[str, str]) -> tuple[bytes, bool]:
    """The bytes of the file, and whether its outputs could be compared with those of the run's network.

    Args:
        form: a key of models.portable.FORMATS.
        metadata: entries for the file.

    Raises UserError if the network cannot be exported, or if the file's outputs differ from the network's.
    """
    backbone, weights = run.config.backbone, run.network.weights()
    if backbone.inputs == "graphs":
        return exported_for_graphs(run, form, metadata), True
    network = Normalised(bare_network(backbone, run.network.classes, weights), backbone.mean, backbone.std).eval()
    make, outputs_of = FORMATS[form]
    images = some_images(3, backbone.image_size)
    batches = images, images[:1]
    try:
        data = make(network, backbone.image_size, metadata)
        outputs = [outputs_of(data, batch, network, backbone) for batch in batches]
    except UserError:
        raise
    except Exception as error:  # an exporter can raise nearly anything about a network that it does not understand
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{backbone.name} cannot be exported as {form}: {reason}. Nothing is written.") from None
    for batch, found in zip(batches, outputs, strict=True):
        if found is not None:
            normalised = (batch - network.get_buffer("mean")) / network.get_buffer("std")
            require_alike(run, form, found, run.network(normalised)["logits"])
    return data, None not in outputs


def exported_for_graphs(run: Finished, form: str, metadata: dict[str, str]) -> bytes:
    """The state dict as a file. Raises UserError for other forms, since programs for images take no graphs."""
    require(
        form == "safetensors",
        f"{run.config.backbone.name} takes graphs, which --format {form} has no form for: --format safetensors writes "
        "its weights.",
    )
    classes = run.network.classes
    data, graphs = file_of(bare_network(run.config.backbone, classes, run.network.weights()), metadata), chains(3)
    require_alike(
        run, form, bare_network(run.config.backbone, classes, load(data))(graphs), run.network(graphs)["logits"]
    )
    return data


def require_alike(run: Finished, form: str, found: Tensor, expected: Tensor) -> None:
    if not difference(found, expected) <= TOLERANCE:  # NaN is not
        raise UserError(
            f"The {form} file does not compute what the network of {run.run_id} does (logits differ by "
            f"{difference(found, expected):.1e} of the largest; {TOLERANCE:.0e} is tolerated): nothing is written."
        )


def card_of(run: Finished, stem: str) -> tuple[dict[str, Any], str]:
    """The model card as data and as Markdown, the same for all formats. stem: the file's name in the Markdown.

    Raises UserError if the run's record lacks what a card needs.
    """
    weights, name, classes = run.network.cpu_weights(), run.config.backbone.name, run.network.classes
    if name in NETWORKS:
        build = f'from delta_transfer.models.zoo import NETWORKS\n\nnetwork = NETWORKS["{name}"]({classes})'
    else:
        options = "".join(f", {key}={value}" for key, value in options_for(name, weights).items())
        call = f'torchvision.models.get_model("{name}", num_classes={classes}{options})'
        build = f"import torchvision\n\nnetwork = {call}"
        if run.config.backbone.library == "timm":
            build = f'import timm\n\nnetwork = timm.create_model("{name}", num_classes={classes})'
    try:
        card = make_card(run.record, run.class_names, fingerprint(weights))
        use = USE_OF_GRAPHS if run.config.backbone.inputs == "graphs" else USE
        return card, in_words(card, use.format(build=build, side=run.config.backbone.image_size, file=stem))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run.run_id}: its record does not say what a model card needs: {error!r}") from None


LOAD_STATE = """```python
from safetensors import safe_open
from safetensors.torch import load_file
{build}
network.load_state_dict(load_file("{file}.safetensors"))
network.eval()
card = safe_open("{file}.safetensors", "pt").metadata()["model_card"]
```"""

USE = (
    """## Use

- `.safetensors`: the network's state dict. The input is the result of step 6.

"""
    + LOAD_STATE
    + """

- `.onnx`: input `images`, float RGB in 0..1, (B, 3, {side}, {side}): steps 1 to 5, divided by 255. Mean and
  standard deviation are inside. Output `logits`, (B, classes).

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
)

USE_OF_GRAPHS = (
    """## Use

`.safetensors` holds the network's state dict.

"""
    + LOAD_STATE
    + """

`network(graphs)` takes a `delta_transfer.data.graphs.Graphs`, which `batch_of` makes of steps 2 and 3, and returns
logits in the order of `json.loads(card)["classes"]`. A run begins with it by
`backbone.weights=path/to/{file}.safetensors`."""
)
