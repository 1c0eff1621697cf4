"""A pass and a target for sylvester in a package of their own."""
