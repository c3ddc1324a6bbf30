"""The search for a setting on the page Methods."""
