"""A method with all that a run could forget: a fit, learned parameters, a buffer, both kinds of random numbers."""

import torch
from torch import Tensor, nn

from delta_transfer.methods import DELTA


class Learned(DELTA):
    def __post_init__(self):
        super().__post_init__()
        self.gate = nn.Linear(3, 1)
        with torch.no_grad():
            self.gate.weight.fill_(0.1)
            self.gate.bias.fill_(0.2)
        self.register_buffer("steps", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(5)

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state)

    def penalty(self, target, outputs, source_outputs) -> dict[str, Tensor]:
        self.steps += 1
        noise = torch.rand((), generator=self.generator) + torch.rand(())
        gates = torch.sigmoid(self.gate(outputs["logits"].float())) * noise
        return super().penalty(target, outputs, source_outputs) | {"gate": (gates * self.steps).mean()}
