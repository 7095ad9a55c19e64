"""Where the channels of a tapped map are, and what counts as a position.

Penalties and channel attention are written for feature maps (B, C, H, W). Maps of other ranks are viewed as such:

| layout | a tapped map                                   | seen as        | what DELTA divides by |
|--------|------------------------------------------------|----------------|-----------------------|
| BCHW   | feature map of a CNN                           | (B, C, H, W)   | H W                   |
| BHWC   | the same, channels last (Swin)                 | (B, C, H, W)   | H W                   |
| BNC    | tokens (ViT); the class token is one of them   | (B, C, N, 1)   | N                     |
| NBC    | tokens, sequence first (torch.nn.Transformer)  | (B, C, N, 1)   | N                     |
| BCN    | sequence of a 1d convolution                   | (B, C, N, 1)   | N                     |
| NC     | nodes of all graphs of a batch; pooled vectors | (N, C, 1, 1)   | 1                     |

Nodes have no batch axis: each counts as an image of one position, so that DELTA is 1/2 sum_c C w_c sum_nodes D^2, a sum
over nodes without a division by their number, as in the published graph code (GTOT-Tuning). That code has no factor C.
It is kept here so that uniform weights mean the same in every layout: their alpha is C times ours. AFA's means over the
batch are means over nodes, and its attention over positions has a single position.
"""

from torch import Tensor

from ..common.errors import UserError

LAYOUTS = ("BCHW", "BHWC", "BNC", "NBC", "BCN", "NC")


def check_layout(layout: str, tap: str) -> None:
    if layout not in LAYOUTS:
        raise UserError(f"The layout of {tap!r} is {layout!r}, which is none of {', '.join(LAYOUTS)}.")


def as_feature_map(value: Tensor, layout: str) -> Tensor:
    """A view of a map of this layout as (B, C, H, W). Raises UserError for another number of axes."""
    if value.dim() != len(layout):
        raise UserError(
            f"A map of the layout {layout} has {len(layout)} axes; this one has the shape {tuple(value.shape)}."
        )
    value = value.movedim(_rows_and_channels(layout), (0, 1))
    for _ in range(4 - len(layout)):
        value = value.unsqueeze(-1)
    return value


def in_layout(feature_map: Tensor, layout: str) -> Tensor:
    """A view that undoes `as_feature_map`."""
    for _ in range(4 - len(layout)):
        feature_map = feature_map[..., 0]
    return feature_map.movedim((0, 1), _rows_and_channels(layout))


def _rows_and_channels(layout: str) -> tuple[int, int]:
    return layout.index("B" if "B" in layout else "N"), layout.index("C")
