"""DELTA in a LightningModule.

    pip install '.[examples]' && python examples/lightning_module.py

The source's weights are random here and the images are noise, so that nothing has to be downloaded. Use pretrained
weights in your own code.
"""

import lightning
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, TensorDataset

from delta_transfer import DELTA, AttentionConfig, Network, tapped


class FineTuning(lightning.LightningModule):
    def __init__(self, source: Network, delta: DELTA, num_classes: int):
        super().__init__()
        self.source, self.delta = source, delta
        self.target = source.with_new_head(num_classes, seed=0).requires_grad_(True).train()

    def on_fit_start(self) -> None:
        # The penalty is a sum over the batch, and the gradient a mean over the processes and accumulated batches.
        self.delta.loss_scale = self.trainer.world_size * self.trainer.accumulate_grad_batches

    def training_step(self, batch, index: int) -> torch.Tensor:
        images, labels = batch
        self.source.eval()  # train() of this module reaches the source too, whose BatchNorm must not move
        outputs = self.target(images)
        with torch.no_grad():
            source_outputs = self.source(images)
        terms = {"cross_entropy": F.cross_entropy(outputs["logits"], labels)}
        terms |= self.delta.penalty(self.target, outputs, source_outputs)
        self.log_dict(terms)
        return sum(terms.values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.target.parameters(), lr=0.01, momentum=0.9)


def main(steps: int = 20) -> dict[str, float]:
    lightning.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(40, 3, 32, 32), torch.arange(40) % 5)
    train = DataLoader(data, batch_size=8, shuffle=True)

    model = torchvision.models.resnet18(num_classes=20)
    source = tapped(model, head="fc", taps=["layer4.1.conv2"]).freeze()
    delta = DELTA(alpha=0.01, attention=AttentionConfig(images=16, head_epochs=2))
    delta.fit(source, train, num_classes=5)  # before the Trainer moves the network to its device

    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",  # "auto" in your own code
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(FineTuning(source, delta, num_classes=5), train)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
