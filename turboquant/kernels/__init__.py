"""Fast versions of functions in `ops`, with the same names and signatures; imported only where they can run."""
