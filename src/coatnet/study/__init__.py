"""The paper's questions, asked again of the user's data: matched networks, equal budgets, paired seeds, a report."""
