"""TurboQuant Lab: what happens to answers, memory and speed when a model's KV cache is compressed."""
