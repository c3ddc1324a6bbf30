"""The pins, their hashes and their licences say the same, and lie within the ranges that the package declares."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
Pins = dict[str, str]


def pins(name: str) -> Pins:
    found = re.findall(r"^([\w.-]+)==([^\s\\]+)", (ROOT / name).read_text(), flags=re.MULTILINE)
    return {canonicalize_name(package): version for package, version in found}


def with_model(found: Pins) -> Pins:
    ((name, version),) = re.findall(r"^EMBEDDED_MODEL := (\S+)==(\S+)$", (ROOT / "Makefile").read_text(), flags=re.M)
    return {**found, name: version}


def test_the_lock_holds_every_pin_but_torch_with_hashes() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    wanted = pins("requirements.txt")
    assert wanted.pop("torch") == "2.13.0"
    assert pins("requirements.lock") == with_model(wanted), "run tests/packaging/refresh.sh"
    entries = re.split(r"^(?=[\w.-]+==)", lock, flags=re.MULTILINE)[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry) for entry in entries)
    assert "://" not in lock


def test_the_licences_of_every_pin_are_listed() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs/licences.md").read_text().splitlines()
        if line.startswith("|")
    ][2:]
    listed = {canonicalize_name(name): version for name, version, _ in rows}
    assert listed == with_model(pins("requirements.txt")), "run tests/packaging/refresh.sh"
    assert not [row for row in rows if re.search(r"UNKNOWN|GPL", row[2])]


def test_the_pins_lie_within_the_declared_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {**pins("requirements.txt"), **pins("requirements-dev.txt")}
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name != "lm-eval"}
    for line in [*project["dependencies"], *(need for needs in extras.values() for need in needs)]:
        declared = Requirement(line)
        assert declared.specifier.contains(pinned[canonicalize_name(declared.name)]), line
