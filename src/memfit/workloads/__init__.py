"""A workload binds data, model, loss and metrics into a TrainingProgram."""
