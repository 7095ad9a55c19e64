"""HookedNetwork: the interface of Network for any module, by forward hooks, for maps of any layout."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from .layouts import as_feature_map, check_layout, in_layout
from .taps import Network, call


class HookedNetwork(Network):
    """`model`, unchanged, with hooks during its forward pass that keep the maps named in `taps`.

    Args:
        model: any module; its forward may take any arguments. Parameters are shared, not copied.
        head: name of the classification layer, a torch.nn.Linear whose outputs are the logits.
        taps: names of modules that run once per pass and return a tensor, or a tuple that begins with one.
        layout: the layout of the tapped maps, one of layouts.LAYOUTS, or a dict of layouts by tap.
        prefix_tokens: number of tokens in front of a map (B, N, C) that are left out of it, such as a class token.

    forward(...) takes the model's own arguments and returns {"logits": (B, K), "embedding": (B, D), each tap: a view
    (B, C, H, W)}; the model's own result is dropped. Raises UserError for a layer that is missing or does not run
    exactly once.

    A traced Network is faster in three ways. Here channel attention takes a whole pass for every channel, since the
    operations behind a tap are unknown; operations that no tap and no logits need are computed, too; and the model goes
    on with a copy of each tapped map, since a later operation might overwrite it.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str,
        taps: Sequence[str] = (),
        layout: str | Mapping[str, str] = "BCHW",
        prefix_tokens: int = 0,
    ):
        super().__init__(model, head, taps)
        self.layouts = layouts_of(self.taps, layout)
        self.prefix_tokens = prefix_tokens

    # The model itself takes the place of Network's `traced`.
    def _trace(self, model: nn.Module) -> nn.Module:
        for name in (self.head, *self.taps):
            if not _has(model, name):
                raise UserError(
                    f"{type(model).__name__} has no layer {name!r}. "
                    f"Its layers start {', '.join([known for known, _ in model.named_modules() if known][:6])}, ..."
                )
        return model

    def _with_model(self, model: nn.Module) -> "HookedNetwork":
        return HookedNetwork(model, self.head, self.taps, self.layouts, self.prefix_tokens)

    def forward(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        return self._run(inputs, named, removed=None)

    @torch.no_grad()
    def logits_without(self, tap: str, channel: int, inputs: Any) -> Tensor:
        """Logits (B, K) with one channel of a tapped map set to 0. inputs: as in `call`."""
        return call(lambda *inputs, **named: self._run(inputs, named, (tap, channel)), inputs)["logits"]

    def _run(self, inputs: Sequence, named: Mapping[str, Any], removed: tuple[str, int] | None) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor) -> None:
            if name in outputs:
                raise UserError(f"{name} runs twice in one forward pass: tap a layer that runs once.")
            outputs[name] = value

        def keep_head(module: nn.Module, arguments: tuple, named: dict, logits: Tensor) -> None:
            keep("logits", logits)
            outputs["embedding"] = arguments[0] if arguments else named["input"]

        def keep_map(tap: str):
            def hook(module: nn.Module, arguments: tuple, output: Tensor | tuple) -> Tensor | tuple:
                value = output[0] if isinstance(output, tuple) else output
                if not isinstance(value, Tensor):
                    raise UserError(f"{tap!r} returns a {type(value).__name__}, not a map: tap a layer inside it.")
                tokens = self.prefix_tokens if self.layouts[tap] == "BNC" else 0
                feature_map = as_feature_map(value[:, tokens:] if tokens else value, self.layouts[tap])
                if removed is not None and removed[0] == tap:
                    feature_map = feature_map.clone()
                    feature_map[:, removed[1]] = 0
                keep(tap, feature_map)
                passed_on = in_layout(feature_map, self.layouts[tap])
                passed_on = torch.cat([value[:, :tokens], passed_on], dim=1) if tokens else passed_on.clone()
                return (passed_on, *output[1:]) if isinstance(output, tuple) else passed_on

            return hook

        # The hooks live only for this pass, so that others can run and save the model unchanged.
        handles = [self.traced.get_submodule(self.head).register_forward_hook(keep_head, with_kwargs=True)]
        handles += [self.traced.get_submodule(tap).register_forward_hook(keep_map(tap)) for tap in self.taps]
        try:
            self.traced(*inputs, **named)
        finally:
            for handle in handles:
                handle.remove()
        for name, layer in (("logits", self.head), *zip(self.taps, self.taps, strict=True)):
            if name not in outputs:
                raise UserError(f"{layer!r} did not run in the forward pass of {type(self.traced).__name__}.")
        return outputs


def tapped(model: nn.Module, head: str, taps: Sequence[str] = (), layout: str | Mapping[str, str] = "BCHW") -> Network:
    """`model` with its tapped maps, as regularizers and `channel_attention` need it.

    This is a traced Network if torch.fx can trace the model, it takes one input, and all maps are (B, C, H, W); else a
    HookedNetwork, whose text says what that costs. Both document arguments, shapes of outputs and errors.

        source = tapped(model, head="fc", taps=["layer3.1.conv2", "layer4.1.conv2"]).freeze()
        target = source.with_new_head(num_classes=20, seed=0).requires_grad_(True).train()
    """
    if _takes_one_input(model) and set(layouts_of(taps, layout).values()) <= {"BCHW"}:
        try:
            return Network(model, head, taps)
        except Exception:  # tracing runs the model's own code, which can raise anything
            # A name that is no layer may be one of torch.fx's: what Network says about it is better.
            if not all(_has(model, name) for name in (head, *taps)):
                raise
    return HookedNetwork(model, head, taps, layout)


def layouts_of(taps: Sequence[str], layout: str | Mapping[str, str]) -> dict[str, str]:
    """The layout of each tap's map. Raises UserError for one that is unknown or missing."""
    layouts = {tap: layout if isinstance(layout, str) else layout.get(tap, "missing") for tap in taps}
    for tap, its_layout in layouts.items():
        check_layout(its_layout, tap)
    return layouts


def _takes_one_input(model: nn.Module) -> bool:
    parameters = signature(model.forward).parameters.values()
    return [p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters].count(True) == 1


def _has(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())
