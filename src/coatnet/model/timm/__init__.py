"""timm's CoAtNets, in the same parts as the paper's where they agree and in their own where they do not."""
