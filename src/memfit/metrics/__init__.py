"""What is measured of predictions: numbers from arrays, no torch."""
