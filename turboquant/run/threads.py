"""How OpenMP's threads wait for each other, which decides how fast PyTorch is on a CPU that others use too.

PyTorch splits most operations over its threads and waits at the end of each. By default GCC's OpenMP waits by spinning,
for milliseconds: on a busy machine the threads that wait take the processor from the one that they wait for, hundreds
of times a token. What that costs is measured by `turboquant bench decode --busy 2`: docs/results.md.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

SPINS = 10_000
"""Rounds of waiting (less than a millisecond) before a thread goes to sleep: waits of a quiet machine are shorter."""


def sleep_while_waiting() -> None:
    """Let the threads of OpenMP sleep while they wait, in this process and those it starts.

    It must be called before PyTorch is imported, whose OpenMP reads the environment once. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"  # other builds of OpenMP
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Let this many other processes compute without a pause within the block, as a busy machine does."""
    spin = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**6))"  # ends when this process does
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", spin]))
            stack.callback(process.kill)
        yield
