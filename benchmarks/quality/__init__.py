"""What low-bit arithmetic costs in quality: our recipes with and without rotations, and peers on the same weights."""
