"""Names, help texts and keys that others rely on change only where somebody means it."""

import pytest

from tests.golden.frozen import FOLDER, FROZEN


@pytest.mark.parametrize("name", FROZEN)
def test_what_others_rely_on_is_as_written_down(name: str) -> None:
    written = (FOLDER / name).read_text(encoding="utf-8")
    assert FROZEN[name]() == written, f"if it was meant to change: python -m tests.golden, and read {name}'s difference"
