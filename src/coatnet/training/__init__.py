"""How a model learns: recipes and configurations, the trainer, the optimizer, checkpoints, loggers."""
