"""Whose turn it is: first in, first out, short work before long work, and long work not for ever behind short work."""

from app.engine.job import Job

MAX_PASSED = 4
"""Short jobs that may go before a waiting long one."""
TURN_S = 20.0
"""How long a long job works on before it lets another long job have a turn, in seconds."""


class JobQueue(list[Job]):
    """Waiting jobs, oldest first. The engine's lock guards it."""

    def take(self) -> Job:
        """Take the oldest short job, or the oldest long one where none waits or it has been passed often enough."""
        long = next((job for job in self if not job.request.short), None)
        short = next((job for job in self if job.request.short), None)
        chosen = short if short and (long is None or long.passed < MAX_PASSED) else long
        assert chosen is not None
        if long is not None and chosen is short:
            long.passed += 1
        self.remove(chosen)
        return chosen

    def before(self, job: Job) -> int:
        """How many of the others have their turn before this one, or before it is passed no longer."""
        older = self[: self.index(job)]
        if job.request.short:
            return sum(other.request.short for other in older)
        return sum(not other.request.short for other in older) + sum(other.request.short for other in self)

    def wants_turn(self, worked_s: float) -> bool:
        """Shall long work that has had `worked_s` seconds stop between two items?"""
        return any(job.request.short for job in self) or (bool(self) and worked_s >= TURN_S)
