"""Models of the family are ordinary modules: build one, vary it, give it any size, take its features."""

import torch

import coatnet

print("the family:", ", ".join(coatnet.list_variants()))

model = coatnet.create_model("coatnet-femto", num_classes=10).eval()
print(f"coatnet-femto: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")

# The paper's questions are values: where the stride sits, which norm, which attention, which layout.
varied = coatnet.create_model("coatnet-femto", num_classes=10, layout="C-T-T-T", downsample="depthwise")
print(f"... as C-T-T-T: {sum(p.numel() for p in varied.parameters()) / 1e6:.1f} million")

with torch.inference_mode():
    for height, width in ((224, 224), (97, 131)):
        images = torch.randn(2, 3, height, width)
        features = model.forward_features(images)
        print(f"{height} x {width}: features {tuple(features.shape)}, logits {tuple(model(images).shape)}")
