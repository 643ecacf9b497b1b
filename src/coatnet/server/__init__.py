"""A finished model behind HTTP: bounded queues, bounded uploads, health checks, the Open Inference Protocol, a page."""
