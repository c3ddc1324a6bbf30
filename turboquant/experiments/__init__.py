"""What is measured, one file an experiment, and what runs many of them."""
