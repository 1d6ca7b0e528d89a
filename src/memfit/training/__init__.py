"""Staged training in a child process: loop, optimizers, schedules, checkpoints."""
