"""The page Session."""
