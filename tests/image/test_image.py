"""The image, the files around it, and what is written about its sizes."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import AppConfig
from app.engine.shutdown import CLOSE_S, SHOW_S
from tests.image import check
from tests.image.check import ImageBench
from tests.support.process import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
TOOLS = ("buildah", "debootstrap", "chromium")


def variables() -> dict[str, str]:
    """What the Dockerfile sets with ENV."""
    (block,) = re.findall(r"^ENV HOME.*?[^\\]\n", DOCKERFILE, flags=re.MULTILINE | re.DOTALL)
    return dict(re.findall(r"(\w+)=(\S+)", block))


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the top of a Markdown file."""
    _, block, _ = path.read_text(encoding="utf-8").split("---\n", 2)
    content: dict[str, Any] = yaml.safe_load(block)
    return content


def test_the_dockerfile_has_the_pins_of_the_project() -> None:
    (torch,) = re.findall(r"^ARG TORCH=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert f"\ntorch=={torch}\n" in (ROOT / "requirements.txt").read_text()
    (model,) = re.findall(r"^EMBEDDED_MODEL := (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert f"\n{model} " in (ROOT / "requirements.lock").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert f"base={base}\n" in (ROOT / "tests" / "image" / "build.sh").read_text()


def test_only_what_the_app_reads_goes_into_the_image() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line[0] == "!"}
    assert all((ROOT / name).exists() for name in let_in)
    tracked = subprocess.run(["git", "ls-files", "--", *let_in], cwd=ROOT, capture_output=True, text=True, check=True)
    assert let_in == {name for name in let_in if re.search(rf"^{re.escape(name)}(/|$)", tracked.stdout, re.MULTILINE)}
    assert not let_in & {"tests", ".git", ".venv", ".env", ".streamlit"}


def test_compose_and_space_fit_the_image() -> None:
    env, compose = variables(), yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert {name: service["profiles"] for name, service in compose["services"].items()} == {
        "cpu": ["cpu"],
        "gpu": ["gpu"],
    }
    for service in compose["services"].values():
        assert service["ports"] == [f"${{PORT:-{env['STREAMLIT_SERVER_PORT']}}}:{env['STREAMLIT_SERVER_PORT']}"]
        assert service["volumes"] == [f"hub:{env['HF_HOME']}"]
        assert float(service["stop_grace_period"].removesuffix("s")) > AppConfig().stop_s + SHOW_S + CLOSE_S
    assert "hub" in compose["volumes"]
    space = front_matter(ROOT / "deploy" / "spaces" / "README.md")
    assert (space["sdk"], space["app_port"]) == ("docker", int(env["STREAMLIT_SERVER_PORT"]))
    assert len(space["short_description"]) <= 60


def test_the_operators_table_is_the_newest_record() -> None:
    record = ImageBench.model_validate_json((ROOT / "results" / "image.jsonl").read_text().splitlines()[-1])
    assert check.table(record) in (ROOT / "docs" / "operator.md").read_text()


@pytest.mark.nightly
@pytest.mark.browser
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.geteuid() != 0, reason="a chroot needs root")
@pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}")
def test_the_image_is_built_and_a_browser_compares_in_it() -> None:
    subprocess.run([ROOT / "tests" / "image" / "build.sh", check.WORK], check=True)
    subprocess.run([*check.COMMAND, "--threads", "1"], cwd=ROOT, check=True)
