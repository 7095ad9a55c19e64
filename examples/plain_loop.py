"""DELTA in a plain PyTorch loop.

    python examples/plain_loop.py

The data are noisy patterns drawn on the fly. A source network learns 20 of them; the target has 5 others and 40 images.
With a pretrained network of yours, begin at `tapped`.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, TensorDataset

from delta_transfer import DELTA, AttentionConfig, tapped


def patterns(classes: int, count: int, seed: int) -> TensorDataset:
    """`count` images (3, 32, 32) of `classes` patterns, with labels."""
    random = torch.Generator().manual_seed(seed)
    shapes = F.interpolate(torch.randn(classes, 3, 4, 4, generator=random), size=32)
    labels = torch.arange(count) % classes
    return TensorDataset(shapes[labels] + torch.randn(count, 3, 32, 32, generator=random), labels)


def endless(batches: DataLoader):
    while True:
        yield from batches


def pretrained(steps: int) -> torch.nn.Module:
    model = torchvision.models.resnet18(num_classes=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = endless(DataLoader(patterns(20, 400, seed=0), batch_size=32, shuffle=True))
    for _ in range(steps):
        images, labels = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def main(steps: int = 50) -> dict[str, float]:
    torch.manual_seed(0)
    train = DataLoader(patterns(5, 40, seed=1), batch_size=8, shuffle=True, drop_last=True)

    source = tapped(pretrained(steps), head="fc", taps=["layer3.1.conv2", "layer4.1.conv2"]).freeze()
    target = source.with_new_head(num_classes=5, seed=0).requires_grad_(True).train()

    delta = DELTA(alpha=0.01, beta=0.01, attention=AttentionConfig(images=8, head_epochs=2))
    delta.fit(source, train, num_classes=5)  # channel attention, once

    optimizer = torch.optim.SGD(target.parameters(), lr=0.01, momentum=0.9)
    batches = endless(train)
    for _ in range(steps):
        images, labels = next(batches)
        outputs = target(images)  # {"logits", each tap, ...}
        with torch.no_grad():
            source_outputs = source(images)
        terms = {"cross_entropy": F.cross_entropy(outputs["logits"], labels)}
        terms |= delta.penalty(target, outputs, source_outputs)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return {name: term.item() for name, term in terms.items()}


if __name__ == "__main__":
    print(main())
