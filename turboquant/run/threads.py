"""How many threads PyTorch has and how they wait for each other, which decides how fast it is on a shared CPU.

PyTorch splits most operations over its threads and waits at the end of each. By default GCC's OpenMP waits by spinning,
for milliseconds: on a busy machine the threads that wait take the processor from the one that they wait for, hundreds
of times a token. What that costs is measured by `turboquant bench decode --busy 2`: docs/results.md.

OpenMP starts a thread for each processor that the process may run on (its affinity). It does not know a container's
quota of processor time: with more threads than that all of them stand still for the rest of each tenth of a second.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

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


def affinity() -> int:
    """Return on how many processors this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota(root: Path = Path("/")) -> float | None:
    """Return how many processors' time the container grants (cgroup version 2 or 1); None without a limit."""
    groups: list[list[str]] = []
    with suppress(OSError):
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    limits = []
    for _, controllers, own in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # Inside a container its own group is usually the root; elsewhere every group above has a say.
        folder = base / own.lstrip("/")
        limits += [_limit(one) for one in (folder, *folder.parents) if one.is_relative_to(base)]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(group: Path) -> float | None:
    """Return the limit of one group, in processors."""
    with suppress(OSError, ValueError):
        time, period = map(float, (group / "cpu.max").read_text().split())  # "max" is no number
        return time / period
    with suppress(OSError, ValueError):
        time, period = (float((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return time / period if time > 0 else None
    return None


def stay_within_quota() -> None:
    """Give OpenMP no more threads than the container's quota has whole processors, one at least.

    It must be called before PyTorch is imported. A number that the user has set (`OMP_NUM_THREADS`) stays.
    """
    granted = quota()
    if granted is not None and granted < affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(granted))))


def settle_threads() -> None:
    """Do both, as the app, the commands and the lm-eval integration do before they import PyTorch."""
    stay_within_quota()
    sleep_while_waiting()


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Let this many other processes compute without a pause within the block, as a busy machine does."""
    spin = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**6))"  # ends when this process does
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", spin]))
            stack.callback(process.kill)
        yield
