"""Scores on the frozen test rows, beside baselines."""
