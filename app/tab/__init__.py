"""What one browser tab has: its state, its runs, what it asks for."""
