"""What is computed: the networks of the paper and timm's, from a row of the registry to logits."""
