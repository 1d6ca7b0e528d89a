"""The heart: budgets, probes, search and plans."""
