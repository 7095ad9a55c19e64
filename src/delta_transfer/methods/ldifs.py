"""LDIFS: the distance of normalised features of several depths (Mukhoti, Gal, Torr, Dokania, TMLR 2024)."""

from torch import Tensor

from ..common.options import option
from ..models import Network
from .base import METHODS, FeaturePenalty, Needs, Outputs, added, of_source, of_tap, taps_of
from .fast.distances import unit_positions


@METHODS.register("ldifs", "LDIFS")
class LDIFS(FeaturePenalty):
    """Omega = mean_l mean_{b,c,p} (n(F_l)[b,c,p] - n(F0_l)[b,c,p])^2, loss = CE + alpha * Omega + beta/2 * ||head||^2.

    l runs over the taps and the embedding, which is a map of one position. F_l is the target's map, F0_l that of the
    frozen source for the same images, (B, C_l, ...). n divides each position p by its norm over the channels, plus
    1e-10, so that Omega does not depend on the scale of the network's maps.

    Source: the authors' code (omegafragger/ldifs_code at 5ffdeef, loss/ldifs.py): a mean over the entries of each
    layer, then a mean over the layers. The paper's text concatenates the features of all layers instead, which weighs a
    layer by its channels. The authors take alpha 10 (args.py there), from 0.01 to 100. They begin with a linear probe's
    head: reg=sum with the terms ldifs and lp_ft does that. `penalty` returns the terms "features" and "head".
    """

    alpha: float = option(10.0, "strength of the penalty on the normalised features, a mean over the batch", at_least=0)

    needs = Needs(source=True, source_logits=True, taps=True)  # the source's embedding comes with its logits

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        def omega() -> Tensor:
            layers, of_frozen = [*taps_of(target), "embedding"], of_source(source_outputs)
            pairs = [(outputs[layer], of_tap(of_frozen, layer, like=outputs[layer])) for layer in layers]
            means = [(unit_positions(own) - unit_positions(frozen)).square().mean() for own, frozen in pairs]
            return added(means) / len(layers)

        return {"features": self.alpha * self.in_this_step(omega, outputs["logits"])} | self.head_penalty(target)
