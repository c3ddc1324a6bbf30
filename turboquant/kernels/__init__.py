"""What is computed on codes: a plain-torch reference of everything, and faster versions where they can run.

Importing this package's modules brings no compiler along: `cpu` (numba) and `triton` are imported when first called.
"""
