"""A model of how long kernels take that nobody could time yet: their machine code, the shapes, and a table of constants."""
