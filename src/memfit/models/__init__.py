"""Neural networks only: no training code, no data code."""
