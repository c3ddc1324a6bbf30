"""The page Needle."""
