"""What a GPU makes of whole models and of single kernels, beside PyTorch on the same card."""
