"""Training for PyTorch that fits the memory you have."""

__version__ = "0.1.0"
