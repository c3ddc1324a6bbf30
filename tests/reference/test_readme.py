"""What the README tells a newcomer to type works."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_library_example_runs_and_packs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "cache_class='CompressedCache'" in printed
    packed = re.search(r"compressed_tokens=(\d+)", printed)
    assert packed is not None
    assert int(packed[1]) > 100


def test_commands_and_files_named_exist() -> None:
    from typer.main import get_command

    from turboquant.cli import app

    command = get_command(app)
    for line in re.findall(r"^\.venv/bin/turboquant ([\w-]+)", README, flags=re.MULTILINE):
        assert line in command.commands  # type: ignore[attr-defined]
    root = Path(__file__).resolve().parents[2]
    for path in re.findall(r"\]\((assets/[^)]+)\)", README):
        assert (root / path).is_file()
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
