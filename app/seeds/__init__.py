"""The page Seeds."""
