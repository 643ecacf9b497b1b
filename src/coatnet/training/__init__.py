"""How a model learns: recipe (the type), recipes (the values), trainer, optimization, checkpoint."""
