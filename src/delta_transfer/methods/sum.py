"""A sum of methods: one loss has all their penalties, and each method changes the target as it does alone."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ..common.errors import UserError
from ..common.options import MISSING, OptionError, option
from ..models import Network
from .base import (
    METHODS,
    NO_SHAPES,
    Batch,
    MapShapes,
    MethodConfig,
    Needs,
    Outputs,
    Regularizer,
    SourceShapes,
    TrainState,
)


@dataclass
class SumConfig(MethodConfig):
    """The penalties of several methods, added: +reg@reg.terms.<any name>=<method> adds one more."""

    terms: dict[str, Any] = option({}, "the methods that are added, by names that you choose")
    beta: float = option(0.0, "strength of the L2 penalty on the new head; the terms have none", at_least=0)
    weight_decay: float = option(
        1e-4, "weight decay of the optimizer, on every trained parameter; the terms have none", at_least=0
    )

    def build(self) -> "Sum":
        terms = {}
        for name, term in self.terms.items():
            with about_term(name):
                terms[name] = term.build()
        return Sum(terms, self.beta, self.weight_decay)

    @property
    def title(self) -> str:
        """The titles of the terms, such as LwF+AT. The user chooses the name of a sum, so that it says little."""
        return "+".join(term.title for term in self.terms.values())

    def check(self) -> None:
        self.require(
            bool(self.terms),
            "terms",
            "A sum needs terms: reg=sum +reg@reg.terms.at=at adds reg=at under the name at.",
        )
        for name, term in self.terms.items():
            self.require(
                isinstance(term, MethodConfig),
                f"terms.{name}",
                f"reg.terms.{name} is not a method: +reg@reg.terms.{name}=METHOD adds one of conf/reg.",
            )
            for key in ("beta", "weight_decay"):
                if hasattr(term, key):
                    setattr(term, key, 0.0)
        if self.name == "sum":
            self.name = "_".join(term.name for term in self.terms.values())
        self.require(
            self.name == MISSING or bool(re.fullmatch(r"[\w.+-]{1,80}", self.name)),
            "name",
            f"reg.name={self.name!r} becomes a part of a folder's name: use up to 80 letters, digits and _ . + -.",
        )


@contextmanager
def about_term(name: str) -> Iterator[None]:
    """In this context, errors name a term's options by their place in the sum: reg.alpha is reg.terms.<name>.alpha."""

    def placed(text: str) -> str:
        return re.sub(r"\breg\.", f"reg.terms.{name}.", text)

    try:
        yield
    except OptionError as error:
        raise OptionError(placed(error.key), placed(str(error))) from None
    except UserError as error:
        raise UserError(placed(str(error))) from None


@METHODS.register("sum", "Sum", SumConfig)
class Sum(Regularizer):
    """Loss = CE + the penalties of all terms + beta/2 * ||head||^2. A loss is named `<term>.<its own name>`.

    terms: methods by names that you choose. `beta` and `weight_decay` are the sum's; those of its terms are set to 0.
    Every term keeps its source, its own modules and its hooks. L2T-ww trains on M + the other terms' penalties; its
    meta-networks still learn from CE after steps on M. A term without a penalty changes the target as it does alone:
    LP-FT gives the first head, RIFLE redraws the head, and StochNorm or LP-FT (only one of them) replaces BatchNorm.

    These cannot be terms: sums, methods in stages (AFA: take one of its stages), Bi-Tuning, and methods that only
    choose the weight decay or the trained parameters (L2, L2-FE). Raises UserError for them, for a name that is an
    attribute of torch.nn.ModuleDict, and for two terms whose `fit` has the same file or that both replace BatchNorm.
    """

    def __init__(self, terms: Mapping[str, Regularizer], beta: float = 0.0, weight_decay: float = 1e-4):
        super().__init__()
        self.beta, self.weight_decay = beta, weight_decay
        fitted: dict[str, str] = {}  # names of terms, by what they have fitted
        for name, term in terms.items():
            if (why := unfit(term)) is not None:
                raise UserError(f"reg.terms.{name} cannot be a term of a sum: {type(term).__name__} {why}.")
            if term.needs.fitted in fitted:
                raise UserError(
                    f"Only one term of a sum can have its {term.needs.fitted} computed before training, not both "
                    f"reg.terms.{fitted[term.needs.fitted]} and reg.terms.{name}."
                )
            if term.needs.fitted:
                fitted[term.needs.fitted] = name
            term.beta = term.weight_decay = 0.0
            term.term = name
        own = [name for name, term in terms.items() if term.needs.own_batchnorm]
        if len(own) > 1:
            raise UserError(
                f"Only one term of a sum can have BatchNorm layers of its own, not both reg.terms.{own[0]} and "
                f"reg.terms.{own[1]}: with fixed_statistics=false LP-FT has none."
            )
        needs = [term.needs for term in terms.values()]
        if any(each.same_steps for each in needs) and any(each.own_steps for each in needs):
            raise UserError("A term of this sum looks ahead by plain steps of SGD, and another changes them: drop one.")
        try:
            self.terms = nn.ModuleDict(terms)
        except KeyError as error:
            raise UserError(f"reg.terms: a term cannot have this name ({error.args[0]}): choose another.") from None
        switches = [name for name, usual in vars(Needs()).items() if isinstance(usual, bool)]
        either: dict[str, Any] = {name: any(getattr(each, name) for each in needs) for name in switches}
        self.needs = Needs(**either | {"other_sources": all(each.other_sources for each in needs)})

    def by_name(self) -> dict[str, Regularizer]:
        """The terms by their names."""
        return cast(dict[str, Regularizer], dict(self.terms.items()))

    def requires(self, model: nn.Module, optimizer: str, processes: int) -> None:
        for name, term in self.by_name().items():
            with about_term(name):
                term.requires(model, optimizer, processes)

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        for name, term in self.by_name().items():
            with about_term(name):
                term.setup(target, map_shapes, source_shapes)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for term in self.by_name().values() for parameter in term.trained()]

    def trained_in_backbone(self, target: Network) -> dict[str, nn.Parameter]:
        """Parameters that all terms leave to the optimizer."""
        of_terms = [term.trained_in_backbone(target) for term in self.by_name().values()]
        return {name: p for name, p in of_terms[0].items() if all(name in others for others in of_terms)}

    def trained_slowly(self) -> list[nn.Parameter]:
        return [parameter for term in self.by_name().values() for parameter in term.trained_slowly()]

    def parts_to_fit(self) -> list[Regularizer]:
        return [term for term in self.by_name().values() if term.needs.fitted]

    def before_step(self, state: TrainState, step: int, steps: int, seed: int) -> None:
        for term in self.by_name().values():
            term.before_step(state, step, steps, seed)
        self.skips_source = all(term.skips_source for term in self.by_name().values() if term.needs.source)

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        self.extra_metrics = {}
        for name, term in self.by_name().items():
            term.loss_scale = self.loss_scale
            penalty = term.penalty(target, outputs, source_outputs)
            losses |= {f"{name}.{loss}": value for loss, value in penalty.items()}
            self.extra_metrics |= named_after(name, term.extra_metrics)
        return losses | self.head_penalty(target)

    def after_step(
        self, state: TrainState, micro_batches: Sequence[Batch], source_outputs: Sequence[Outputs | None]
    ) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        for name, term in self.by_name().items():
            again = (micro_batches, source_outputs) if term.needs.micro_batches_again else ((), ())
            metrics |= named_after(name, term.after_step(state, *again))
        return metrics


def unfit(term: Regularizer) -> str | None:
    """Why a method cannot be a term of a sum, or None."""
    method = type(term)
    if isinstance(term, Sum):
        return "is a sum itself: name its terms"
    if method.stages is not Regularizer.stages:
        return "trains in stages"
    changes = ("penalty", "setup", "before_step")
    if term.needs.frozen_backbone or all(getattr(method, name) is getattr(Regularizer, name) for name in changes):
        return "has nothing to add (weight decay is reg.weight_decay)"
    if term.needs.views > 1:
        return "needs several views of each image"
    return None


def named_after(term: str, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"attention_{term}.{name.removeprefix('attention_')}": value for name, value in metrics.items()}
