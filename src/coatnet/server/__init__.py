"""A finished model behind HTTP: bounded in bytes, pixels, images and time, and honest about its state."""
