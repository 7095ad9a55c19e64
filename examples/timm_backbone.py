"""timm's networks: L2-SP and DELTA on a CNN, the two stages of AFA on the tokens of a ViT.

    pip install '.[examples]' && python examples/timm_backbone.py

The "source" has random weights here and the images are noise, so that nothing has to be downloaded. In your own code
write timm.create_model(..., pretrained=True).
"""

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from delta_transfer import AFA, DELTA, L2SP, AttentionConfig, Network, Regularizer, tapped


def fine_tune(source: Network, target: Network, method: Regularizer, batches: list, steps: int, lr: float) -> dict:
    parameters = [*target.parameters(), *method.trained()]  # AFA's attention is learned with the target
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    for step in range(steps):
        images, labels = batches[step % len(batches)]
        outputs = target(images)
        with torch.no_grad():
            source_outputs = source(images)
        terms = {"cross_entropy": F.cross_entropy(outputs["logits"], labels)}
        terms |= method.penalty(target, outputs, source_outputs)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return {name: term.item() for name, term in terms.items()}


def cnn(batches: list, steps: int) -> dict[str, float]:
    model = timm.create_model("resnet18", pretrained=False, num_classes=20)
    source = tapped(model, head="fc", taps=["layer4.1.conv2"]).freeze()  # traced: attention is fast

    delta = DELTA(alpha=0.01, attention=AttentionConfig(images=16, head_epochs=2))
    delta.fit(source, batches, num_classes=5)
    target = source.with_new_head(5, seed=0).requires_grad_(True).train()
    terms = fine_tune(source, target, delta, batches, steps, lr=0.01)

    l2_sp = L2SP(alpha=0.01)
    target = source.with_new_head(5, seed=0).requires_grad_(True).train()
    l2_sp.setup(target)  # keeps the starting weights
    return terms | fine_tune(source, target, l2_sp, batches, steps, lr=0.01)


def vit(batches: list, steps: int) -> dict[str, float]:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=20)
    source = tapped(model, head="head", taps=["blocks.0", "blocks.1"], layout="BNC").freeze()
    target = source.with_new_head(5, seed=0).requires_grad_(True).train()
    previous = source
    for stage in AFA(alpha=0.001, channel_alpha=0.001).stages():  # positions (here tokens), then channels
        alignment_target = source if stage.alignment_target == "source" else previous
        stage.method.setup(target, source.map_shapes_on(batches[0][0]))
        terms = fine_tune(alignment_target, target, stage.method, batches, steps, lr=0.01 * stage.lr_factor)
        previous = target.copy().freeze()
    return terms


def main(steps: int = 20) -> dict[str, float]:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 5) for _ in range(5)]
    of_vit = {f"vit/{name}": value for name, value in vit(batches, steps).items()}
    return cnn(batches, steps) | of_vit


if __name__ == "__main__":
    print(main())
