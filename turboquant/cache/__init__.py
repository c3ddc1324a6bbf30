"""A cache of packed keys and values that stands in for Hugging Face's own."""
