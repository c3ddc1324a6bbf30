"""Write down anew what must not change by itself: `python -m tests.golden`, then read the difference."""

from tests.golden.frozen import FOLDER, FROZEN

for name, make in FROZEN.items():
    (FOLDER / name).write_text(make(), encoding="utf-8")
