"""A sum of methods: the penalties of all in one loss, and what each does to the target beside it."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..common.errors import UserError
from ..config import about_term
from ..models import Network
from .base import NO_SHAPES, MapShapes, Outputs, OutputShapes, Part, Regularizer, TrainState


class Sum(Regularizer):
    """Loss = CE + the penalties of all terms + beta/2 * ||head||^2. A loss term is named `<term>.<its own name>`.

    terms: methods by names of one's own. `beta` and `weight_decay` are the sum's: those of its terms do not count.
    Every term keeps its source, its modules and what follows its step: L2T-ww's is on M + the others' penalties too,
    while its meta-networks are judged as ever, by CE after steps on M. A term without a penalty changes the target as
    it does alone: LP-FT its first head, RIFLE its head on the way, StochNorm (or LP-FT, one of both) its BatchNorm.

    No terms can be methods in stages (AFA: take one of them), with a training step of their own, or with nothing but a
    choice of weight decay or of what is trained (L2, L2-FE).
    """

    def __init__(self, terms: Mapping[str, Regularizer], beta: float = 0.0, weight_decay: float = 1e-4):
        super().__init__(beta=beta, weight_decay=weight_decay)
        for name, term in terms.items():
            if (why := unfit(term)) is not None:
                raise UserError(f"reg.terms.{name} cannot be a term of a sum: {type(term).__name__} {why}.")
            term.beta = term.weight_decay = 0.0
        try:
            self.terms = nn.ModuleDict(terms)
        except KeyError as error:
            raise UserError(f"reg.terms: a term cannot have this name ({error.args[0]}): choose another.") from None
        files: dict[str, str] = {}  # what the fitted terms are called, by the name of the file
        for name, term in terms.items():
            term.fitted_term = name
            if term.fitted_name in files:
                raise UserError(
                    f"Only one term of a sum can have {term.fitted_name} computed before training, not both "
                    f"reg.terms.{files[term.fitted_name]} and reg.terms.{name}."
                )
            if term.fitted_name:
                files[term.fitted_name] = name
        replacing = [name for name, term in terms.items() if term.replaces_batchnorm]
        if len(replacing) > 1:
            raise UserError(
                f"Only one term of a sum can have BatchNorm layers of its own, not both reg.terms.{replacing[0]} and "
                f"reg.terms.{replacing[1]}: LP-FT goes without with fixed_statistics=false."
            )
        for need in ("needs_source", "needs_source_logits", "needs_taps"):
            setattr(self, need, any(getattr(term, need) for term in terms.values()))
        self.any_source = all(term.any_source for term in terms.values())

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        for name, term in self.terms.items():
            with about_term(name):
                term.start(target, map_shapes, source_shapes)
        self.returns_to_batch = any(term.returns_to_batch for term in self.terms.values())

    def trained(self) -> list[nn.Parameter]:
        return [parameter for term in self.terms.values() for parameter in term.trained()]

    def trained_slowly(self) -> list[nn.Parameter]:
        return [parameter for term in self.terms.values() for parameter in term.trained_slowly()]

    def to_fit(self) -> list[Regularizer]:
        return [term for term in self.terms.values() if term.fitted_name]

    def before_step(self, learner: TrainState, step: int, steps: int, seed: int) -> None:
        for term in self.terms.values():
            term.before_step(learner, step, steps, seed)

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        losses, self.observed = {}, {}
        for name, term in self.terms.items():
            term.parts = self.parts
            penalty = term.penalty(target, outputs, source_outputs)
            losses |= {f"{name}.{loss}": value for loss, value in penalty.items()}
            self.observed |= named_after(name, term.observed)
        return losses | self.head_penalty(target)

    def after_step(self, learner: TrainState, parts: list[Part]) -> dict[str, Tensor]:
        observed = {}
        for name, term in self.terms.items():
            if term.returns_to_batch:
                observed |= named_after(name, term.after_step(learner, parts))
        return observed


def unfit(term: Regularizer) -> str | None:
    """Why a method cannot be a term of a sum, or None."""
    method = type(term)
    if issubclass(method, Sum):
        return "is one itself: name its terms"
    if method.stages is not Regularizer.stages:
        return "trains in stages"
    changes = ("penalty", "start", "before_step")
    if method.freezes_backbone or all(getattr(method, name) is getattr(Regularizer, name) for name in changes):
        return "has nothing to add (weight decay is reg.weight_decay)"
    if method.update is not Regularizer.update or method.step_on is not Regularizer.step_on:
        return "has a training step of its own"
    return None


def named_after(term: str, observed: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"attention_{term}.{name.removeprefix('attention_')}": value for name, value in observed.items()}
