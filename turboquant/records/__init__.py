"""What is written down: records, their files, their words. Pydantic and plain Python; torch is not imported."""
