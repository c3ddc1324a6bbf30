"""The engine: one worker thread, the queue of jobs before it, what becomes of them."""
