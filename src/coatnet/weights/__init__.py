"""Weights from elsewhere: timm's CoAtNets as ours, and the Hugging Face hub."""
