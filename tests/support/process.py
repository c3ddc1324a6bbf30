"""A server process for tests that look at it from outside: its log, its metrics, its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

import psutil

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`streamlit run` on a port of its own; a block's end stops it and everything it started.

    Attributes:
        log: Where its output goes.
        address: Where it is served.
    """

    def __init__(
        self, log: Path, environment: Mapping[str, str], *, port: int | None = None, before: Sequence[str] = ()
    ) -> None:
        self.log, self.port = log, port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        settings = {"port": self.port, "headless": "true", "fileWatcherType": "none"}
        flags = [f"--server.{name}={value}" for name, value in settings.items()]
        self._command = [*before, sys.executable, "-m", "streamlit", "run", *flags]
        self._environment = {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **environment}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=out, stderr=out, env=self._environment, start_new_session=True
            )
        end = time.monotonic() + 90
        while not self.healthy():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def healthy(self) -> bool:
        """Does it answer?"""
        try:
            with urlopen(f"{self.address}/_stcore/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    @property
    def pid(self) -> int:
        """The number of its process."""
        assert self.process is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Wait for its end; returns the exit status as a shell gives it."""
        assert self.process is not None
        status = self.process.wait(timeout=seconds)
        return status if status >= 0 else 128 - status

    def family(self) -> list[psutil.Process]:
        """It and every process it started."""
        me = psutil.Process(self.pid)
        return [me, *me.children(recursive=True)]

    def rss_mib(self) -> float:
        """Its resident memory."""
        return float(psutil.Process(self.pid).memory_info().rss) / 2**20

    def metrics(self) -> dict[str, float]:
        """What /metrics says, by name and labels."""
        with urlopen(f"{self.address}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The log's lines that are JSON: all, or those of one event."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if name is None or line.get("event") == name]
