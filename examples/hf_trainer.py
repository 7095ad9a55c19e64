"""DELTA on the tokens of a ViT, in Hugging Face's Trainer.

    pip install '.[examples]' && python examples/hf_trainer.py

The source's weights are random here and the images are noise, so that nothing has to be downloaded. In your own code
write `source_model = ViTForImageClassification.from_pretrained(...)`.
"""

import tempfile

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from delta_transfer import DELTA, AttentionConfig, Network, tapped


class FineTuning(Trainer):
    def __init__(self, source: Network, delta: DELTA, **options):
        super().__init__(**options)
        self.source, self.delta = source.to(self.args.device), delta
        # The loss is the mean over a batch, and the Trainer must divide it by the number of accumulated batches; the
        # penalty is a sum over all of them and over the processes.
        self.model_accepts_loss_kwargs = False
        self.delta.loss_scale = self.args.gradient_accumulation_steps * self.args.world_size

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"])
        with torch.no_grad():
            source_outputs = self.source(pixel_values=inputs["pixel_values"])
        target = self.accelerator.unwrap_model(model)
        penalty = self.delta.penalty(target, outputs, source_outputs)
        loss = F.cross_entropy(outputs["logits"], inputs["labels"]) + sum(penalty.values())
        self.terms = {name: term.item() for name, term in penalty.items()}
        return (loss, {"logits": outputs["logits"]}) if return_outputs else loss


def main(steps: int = 20) -> dict[str, float]:
    torch.manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 5} for i in range(40)]
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = ViTConfig(image_size=32, patch_size=8, num_labels=20, **sizes)
    source_model = ViTForImageClassification(config)
    # Blocks return (B, N, C). Before transformers 5 they are called vit.encoder.layer.1.
    source = tapped(source_model, head="classifier", taps=["vit.layers.0", "vit.layers.1"], layout="BNC").freeze()
    target = source.with_new_head(num_classes=5, seed=0).requires_grad_(True).train()

    # Pairs of the model's named arguments, and labels.
    batches = [({"pixel_values": b["pixel_values"]}, b["labels"]) for b in DataLoader(data, batch_size=8)]
    delta = DELTA(alpha=0.01, attention=AttentionConfig(images=8, head_epochs=2))
    delta.fit(source, batches, num_classes=5)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            remove_unused_columns=False,  # the Trainer looks for the columns' names in the network's signature
            save_strategy="no",  # afterwards: target.model.save_pretrained(...)
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = FineTuning(source, delta, model=target, args=arguments, train_dataset=data)
        result = trainer.train()
    return {"loss": result.training_loss} | trainer.terms


if __name__ == "__main__":
    print(main())
