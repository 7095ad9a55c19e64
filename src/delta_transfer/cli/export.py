"""delta-export: a finished run's network as a file for other programs.

    delta-export RUN --format safetensors               # the state dict, for torchvision and timm
    delta-export RUN --format onnx --output bird.onnx   # needs pip install 'delta-transfer[export]'
    delta-export RUN --format torch-export              # a .pt2 file, for torch.export.load

RUN is a run's folder (results/runs/...) or its name below results/runs. The file is RUN/export/model.<suffix>, unless
--output names another place. Beside it is MODEL_CARD.md: data, classes, accuracy, preprocessing, and how to use it. The
same card is in the file's metadata ("model_card", JSON).

safetensors: parameters under the backbone's own names, fp32; normalise images yourself, as the card says.
onnx, torch-export: the input is float RGB in 0..1, (B, 3, H, W), resized and cropped as the card says, any B;
normalisation is inside; the output is logits (B, K), whose softmax is the probabilities.

Before anything is written, the file's outputs are compared with the run's network on a few images (ONNX: if onnxruntime
is installed). If they differ by more than 1e-4 of the largest logit, that is an error, and no file is written. An
earlier export of the same network is replaced; other files are not.

Exit status: 0 if the file is written; 1 if not; 2 for a wrong command line.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..common.console import command_parser, log, stoppable
from ..common.errors import UserError
from ..records.cards import metadata_of
from ..records.files import make_output_folder, write_atomically

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
CARD = "MODEL_CARD.md"


@stoppable
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    export(args.run, args.format, args.output)
    return 0


def parser() -> argparse.ArgumentParser:
    p = command_parser("delta-export", __doc__)
    p.add_argument("run", metavar="RUN", help="a run's folder, or its name below results/runs")
    p.add_argument("--format", choices=list(SUFFIXES), required=True)
    p.add_argument(
        "--output", type=Path, metavar="PATH", help="the file, or a folder for it (default: RUN/export/model.<suffix>)"
    )
    return p


def export(name: str, form: str, output: Path | None) -> None:
    from ..inspect.export import card_of, exported  # imports torch
    from ..inspect.finished import finished, run_folder
    from ..models.portable import TOLERANCE

    run = finished(run_folder(name))
    path = place(output or run.record["folder"] / "export", SUFFIXES[form])
    card, words = card_of(run, path.stem)
    check_nothing_lost(path, card)
    data, verified = exported(run, form, metadata_of(card))
    make_output_folder(path.parent)
    write_atomically(path, data)
    write_atomically(path.parent / CARD, words.encode())
    if verified:
        log.info(f"verified on a few images: the logits are the network's, within {TOLERANCE:.0e} of the largest one")
    else:
        log.info(f"{path} was not verified: onnxruntime is not installed (pip install 'delta-transfer[export]')")
    log.info(f"written: {path} ({len(data) / 1e6:.1f} MB), {path.parent / CARD}")


def place(output: Path, suffix: str) -> Path:
    """The file that --output means; a name without a suffix is a folder. Raises UserError for another suffix."""
    if output.suffix == suffix and not output.is_dir():
        return output
    if output.is_file() or (output.suffix and not output.is_dir()):
        raise UserError(f"--output {output}: a file of this format ends in {suffix}.")
    return output / f"model{suffix}"


def check_nothing_lost(path: Path, card: dict[str, Any]) -> None:
    """Raises UserError if `path` is not free and not an earlier export of the same network."""
    if (path.parent / "summary.json").exists():
        raise UserError(f"{path.parent} is a run's folder, with a network of its own: choose another (--output).")
    described = path.parent / CARD
    try:
        words = described.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path.exists():
            raise UserError(f"{path} exists, and no {CARD} describes it: choose another (--output).") from None
        return
    except ValueError:
        words = ""
    if card["weights_fingerprint"] not in words:
        raise UserError(f"{described} describes another network: choose another folder (--output).")


if __name__ == "__main__":
    sys.exit(main())
