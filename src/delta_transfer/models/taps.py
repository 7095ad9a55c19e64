"""A classification network that also returns its tapped feature maps."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..common.errors import UserError


class Network(nn.Module):
    """`model`, traced so that its forward also returns the feature maps named in `taps`.

    Args:
        model: any network that torch.fx can trace (torchvision's can). Parameters are shared, not copied.
        head: name of the classification layer, e.g. "fc": a torch.nn.Linear or CosineHead.
        taps: names of modules whose outputs are returned, e.g. "layer1.2.conv3".
        aux_head: name of an auxiliary classification layer, returned in training mode only.

    forward(images (B, 3, H, W)) returns {"logits": (B, K), "embedding": (B, D), the head's input before dropout, each
    tap: (B, C, h, w)}, and "aux_logits" (B, K) in training mode with an auxiliary head. Raises UserError for a tap or
    head that the network does not have.
    """

    def __init__(self, model: nn.Module, head: str, taps: Sequence[str] = (), aux_head: str | None = None):
        super().__init__()
        self._model = (model,)  # in a tuple, so that its parameters are not registered a second time
        self.head = head
        self.taps = tuple(taps)
        self.aux_head = aux_head
        for key, name in (("head", head), ("aux_head", aux_head)):
            layer = dict(model.named_modules()).get(name)
            if layer is not None and not isinstance(layer, nn.Linear):
                raise UserError(f"The head {name!r} is a {type(layer).__name__}, not a Linear layer (backbone.{key}).")
        if head == aux_head or head in taps:
            other = "backbone.aux_head" if head == aux_head else "backbone.taps"
            raise UserError(f"backbone.head and {other} both name the layer {head!r}: it can be only one of them.")
        self._first: tuple[nn.Module, ...] = ()  # the layer that takes the input, if it is known
        self.traced = self._trace(model)

    def _trace(self, model: nn.Module) -> nn.Module:
        """The module that forward runs. It has the parameters of `model`, by the same names."""
        from torchvision.models.feature_extraction import (
            create_feature_extractor,
            get_graph_node_names,
        )  # slow to import

        head, aux_head = self.head, self.aux_head
        nodes = {head: "logits"} | {tap: tap for tap in self.taps}
        training_nodes = nodes | ({aux_head: "aux_logits"} if aux_head else {})
        for name in filter(None, (head, aux_head)):
            if name not in dict(model.named_modules()):
                raise UserError(f"{type(model).__name__} has no layer {name!r} (backbone.head, backbone.aux_head).")
        try:
            traced = create_feature_extractor(
                model, train_return_nodes=training_nodes, eval_return_nodes=nodes, suppress_diff_warning=True
            )
        except ValueError:
            # A block's name stands for the block's last node: torchvision resolves it by prefix.
            names = get_graph_node_names(model, suppress_diff_warning=True)[0]  # training mode has all nodes
            for name in training_nodes:
                if not any(f"{known}.".startswith(f"{name}.") for known in names):
                    raise UserError(
                        f"{type(model).__name__} has no layer {name!r} (backbone.head, backbone.taps). "
                        f"Its layers start {', '.join(sorted(set(names))[:6])}, ..."
                    ) from None
            raise
        for graph in (traced.train_graph, traced.eval_graph):
            (output,) = (node for node in graph.nodes if node.op == "output")
            (returned,) = output.args
            embedding = before_dropout(traced, graph, returned["logits"].args[0])
            forbid_inplace(
                traced, graph, {embedding, *embedding.all_input_nodes, *(returned[tap] for tap in self.taps)}
            )
            output.args = ({**returned, "embedding": embedding},)
        traced.recompile()  # takes the edited graph; the other mode's is taken when the mode changes
        reads = next(iter(next(node for node in traced.eval_graph.nodes if node.op == "placeholder").users), None)
        if reads is not None and reads.op == "call_module":
            first = traced.get_submodule(str(reads.target))
            self._first = (first[0] if isinstance(first, nn.Sequential) else first,)
        return traced

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if not torch.compiler.is_compiling():
            self._check_input(images)
        return self.traced(images)

    def _check_input(self, images: Tensor) -> None:
        """Raises UserError for a batch that the first layer cannot take, or that is on another device."""
        for first in self._first:
            if isinstance(first, nn.Conv2d):
                fits = images.dim() == 4 and images.shape[1] == first.in_channels
                expected = f"{first.in_channels}, H, W"
            elif isinstance(first, nn.Linear):
                fits, expected = images.dim() > 1 and images.shape[-1] == first.in_features, f"..., {first.in_features}"
            else:
                return
            weight, shape = first.weight, tuple(images.shape)
            if not fits:
                raise UserError(f"The network takes batches (B, {expected}); this one has the shape {shape}.")
            if not images.is_floating_point():
                raise UserError(f"The network takes numbers of {weight.dtype}, not {images.dtype}: normalise images.")
            if images.device != weight.device:
                raise UserError(f"The batch is on {images.device}, the network on {weight.device}: use to(device).")

    def map_shapes(self, batch: int, image_size: int, training: bool) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of each tapped feature map, without computing any map.

        Raises UserError if `batch` images of this size cannot pass, or a tap is not a feature map.
        """
        # The state dict would lack buffers that a model makes anew.
        own = [*self.named_parameters(), *self.named_buffers()]
        shapes = {name: value.to("meta") for name, value in own}
        images, before = torch.empty(batch, 3, image_size, image_size, device="meta"), self.training
        try:
            with _ShapesOnly():
                outputs = torch.func.functional_call(self.train(training), shapes, (images,))
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if "more than 1 value per channel" in reason:
                reason = "BatchNorm needs more than one value of a channel, so larger batches or images"
            raise UserError(
                f"{batch} image{'s' * (batch > 1)} of {image_size} x {image_size} pixels cannot pass through "
                f"{type(self._model[0]).__name__} (backbone.image_size, schedule.batch_size): {reason}"
            ) from error
        finally:
            self.train(before)
        return self._shapes(outputs)

    @torch.no_grad()
    def map_shapes_on(self, inputs: Any) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of each tapped feature map for a batch's `inputs` (as in `call`), in evaluation mode."""
        before = self.training
        try:
            return self._shapes(call(self.eval(), inputs))
        finally:
            self.train(before)

    def _shapes(self, outputs: dict[str, Tensor]) -> dict[str, tuple[int, int, int]]:
        shapes = {}
        for tap in self.taps:
            if outputs[tap].dim() != 4:
                raise UserError(f"backbone.taps: {tap!r} is not a feature map but {tuple(outputs[tap].shape)}.")
            _, channels, height, width = outputs[tap].shape
            shapes[tap] = channels, height, width
        return shapes

    @property
    def model(self) -> nn.Module:
        """The module that was tapped; its parameters are the network's."""
        return self._model[0]

    @property
    def classes(self) -> int:
        """The number of classes of the head."""
        layer = self.model.get_submodule(self.head)  # tracing takes a CosineHead apart
        assert isinstance(layer, nn.Linear)
        return layer.out_features

    def is_head(self, name: str) -> bool:
        """Whether the parameter `name` (as in the model's own state dict) belongs to a new classification layer."""
        return name.startswith((self.head + ".", *([self.aux_head + "."] if self.aux_head else [])))

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the classification layers, by the model's own names."""
        return {name: p for name, p in self.traced.named_parameters() if self.is_head(name)}

    def backbone_parameters(self) -> dict[str, nn.Parameter]:
        """All other parameters, by the model's own names."""
        return {name: p for name, p in self.traced.named_parameters() if not self.is_head(name)}

    def weights(self) -> dict[str, Tensor]:
        """State dict under the model's own parameter names."""
        return self.traced.state_dict()

    def cpu_weights(self) -> dict[str, Tensor]:
        """`weights` on the CPU and contiguous, for a file."""
        return {key: value.cpu().contiguous() for key, value in self.weights().items()}

    def copy(self) -> "Network":
        """A copy that shares no parameters."""
        return self._with_model(copy.deepcopy(self._model[0]))

    def _with_model(self, model: nn.Module) -> "Network":
        return Network(model, self.head, self.taps, self.aux_head)

    def with_new_head(
        self, num_classes: int, seed: int, layer: Callable[[int, int], nn.Linear] | None = None
    ) -> "Network":
        """A copy whose classification layers are new, for `num_classes`.

        layer: makes the head from the number of its input features and `num_classes`. None: the model's own
        `make_head`, or nn.Linear with PyTorch's default initialisation, as every auxiliary head. Raises UserError if
        `num_classes` is not a whole number from 1 on.
        """
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise UserError(f"A head needs a whole number of classes from 1 on, got num_classes={num_classes!r}.")
        model = copy.deepcopy(self._model[0])
        make_head: Callable[[int, int], nn.Linear] = getattr(model, "make_head", nn.Linear) if layer is None else layer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in filter(None, (self.head, self.aux_head)):
                old = model.get_submodule(name)
                if not isinstance(old, nn.Linear):
                    raise UserError(f"The head {name!r} is a {type(old).__name__}, not a Linear layer (backbone.head).")
                make = make_head if name == self.head else nn.Linear
                model.set_submodule(name, make(old.in_features, num_classes).to(old.weight))
        return self._with_model(model)

    def freeze(self) -> "Network":
        """Evaluation mode and no gradients; returns itself."""
        return self.eval().requires_grad_(False)


class _ShapesOnly(TorchFunctionMode):
    """Skips BatchNorm, which keeps the shape. On the meta device it runs in Python, and takes most of a pass's time."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and args[0][:, 0].numel() > 1:  # PyTorch refuses one value per channel
            return args[0]
        return func(*args, **(kwargs or {}))


def before_dropout(traced: fx.GraphModule, graph: fx.Graph, node: fx.Node) -> fx.Node:
    """`node` without the dropouts right before it. A flatten between them is added again."""
    before = node.args[0] if node.args else None
    if not isinstance(before, fx.Node):
        return node
    module = node.op == "call_module" and traced.get_submodule(str(node.target))
    if isinstance(module, nn.Dropout) or (node.op == "call_function" and node.target is F.dropout):
        return before_dropout(traced, graph, before)
    if node.target in (torch.flatten, "flatten"):
        value = before_dropout(traced, graph, before)
        if value is not before:
            with graph.inserting_after(node):
                return graph.create_node(node.op, node.target, (value, *node.args[1:]), node.kwargs)
    return node


def call(network: Callable[..., Any], inputs: Any) -> Any:
    """The result of `network` for the inputs of a batch, of any shape.

    A tuple or list holds its arguments, a mapping its named arguments; anything else is its one argument.
    """
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, tuple | list) else network(inputs)


def forbid_inplace(traced: fx.GraphModule, graph: fx.Graph, values: set[fx.Node]) -> None:
    """Stops operations of `graph` that read one of `values` from overwriting it."""
    for node in graph.nodes:
        if not values.intersection(node.all_input_nodes):
            continue
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None and hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
        elif node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
