"""What several tests ask of the system: a terminal, a small file system. No model, and no PyTorch."""

import contextlib
import io
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from turboquant import cli


@contextmanager
def file_system(place: Path, size: str) -> Iterator[Path]:
    """A new folder with a file system of its own of that size ("12k"); the test is skipped where none can be."""
    place.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def enlarge(place: Path, size: str) -> None:
    """Give a `file_system` another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


def at_terminal(words: list[str]) -> tuple[int, str]:
    """Run a command in this process with a real terminal as its standard output; return its code and what stood there.

    Standard error is no terminal, so that nothing is drawn.
    """
    ours, theirs = pty.openpty()
    found = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # what a terminal whose other end is closed says
            while data := os.read(ours, 65536):
                found.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        with os.fdopen(theirs, "w") as terminal, contextlib.redirect_stdout(terminal):
            try:
                cli.app(words)
            except SystemExit as left:
                code = int(left.code or 0)
    finally:
        sys.stdin = stdin
        reader.join()
        os.close(ours)
    return code, found.decode().replace("\r\n", "\n")


@contextmanager
def interrupted(output: Path, records: int = 1) -> Iterator[None]:
    """While the block runs, send this process Ctrl-C's signal as soon as a file has that many lines."""
    left = threading.Event()

    def press() -> None:
        while not left.wait(0.002):
            if output.exists() and output.read_bytes().count(b"\n") >= records:
                os.kill(os.getpid(), signal.SIGINT)
                return

    watch = threading.Thread(target=press)
    watch.start()
    try:
        yield
    finally:
        left.set()
        watch.join()
