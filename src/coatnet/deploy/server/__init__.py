"""A finished model behind HTTP: bounded in bytes, pixels, pictures and time, and honest about its state."""
