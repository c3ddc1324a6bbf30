"""Plain-torch reference of everything that has a kernel, and the choice of which one runs."""
