"""What goes in: datasets, decoding, transforms, mixing, sample order and loading."""
