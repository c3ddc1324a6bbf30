"""A model at work: answers, two answers side by side, heads compared, conversations."""
