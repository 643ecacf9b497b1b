"""timm's CoAtNets: their variants, and the blocks that the paper's do not have."""
