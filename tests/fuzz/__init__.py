"""A fuzzer in the way of NeuRI (Liu et al., 2023): graphs grown from recorded calls, through every pass and backend."""
