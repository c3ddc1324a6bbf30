"""What others rely on, as files that a test compares: names, addresses, help texts, keys of cells."""
