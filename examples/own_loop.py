"""The model in a loop of one's own: nothing of the package's training is needed to train it."""

import torch
from torch.nn.functional import cross_entropy

import coatnet

torch.manual_seed(0)
digits = coatnet.open_dataset("digits").training
pixels, labels = zip(*(digits.read(i) for i in range(128)), strict=True)
images = torch.stack([torch.from_numpy(p.copy()) for p in pixels])[:, None].float() / 255 - 0.5
labels = torch.tensor([int(label) for label in labels])

model = coatnet.create_model("coatnet-femto", num_classes=10, in_channels=1, resolution=32)
images = torch.nn.functional.interpolate(images, size=32)  # 8 x 8 does not survive the strides of this variant
exempt = model.no_weight_decay()  # the relative biases, besides all vectors
groups = [
    {
        "params": [p for n, p in model.named_parameters() if p.ndim > 1 and n not in exempt],
        "weight_decay": 0.05,
    },
    {"params": [p for n, p in model.named_parameters() if p.ndim <= 1 or n in exempt], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=1e-3)

for epoch in range(3):
    for batch in torch.randperm(len(images)).split(32):
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
