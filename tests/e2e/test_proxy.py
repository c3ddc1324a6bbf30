"""The proxy of the operator's guide, in a real browser."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.conftest import ENVIRONMENT, IN_A_BROWSER, SECONDS, main, visit
from tests.support.process import ROOT, Server, free_port

pytestmark = [
    *IN_A_BROWSER,
    pytest.mark.nightly,
    pytest.mark.skipif(shutil.which("nginx") is None or os.geteuid() != 0, reason="needs nginx and root"),
]


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[str]:
    """The address of a proxy in front of a server."""
    guide = (ROOT / "docs" / "operator.md").read_text()
    (locations,) = re.findall(r"<!-- nginx -->\n```text\n(.*?)```", guide, flags=re.DOTALL)
    port = free_port()
    with Server(tmp_path / "log.txt", ENVIRONMENT) as server:
        assert "127.0.0.1:8501;" in locations
        here = locations.replace("127.0.0.1:8501;", f"127.0.0.1:{server.port};")
        config = tmp_path / "nginx.conf"
        config.write_text(
            f"daemon off; user root; pid {tmp_path}/pid; error_log {tmp_path}/error.log;\n"
            f"events {{}}\nhttp {{ access_log off; server {{ listen 127.0.0.1:{port};\n{here}}} }}\n"
        )
        with subprocess.Popen(["nginx", "-c", config, "-p", tmp_path]) as proxy:
            yield f"http://127.0.0.1:{port}"
            proxy.terminate()


def test_a_compare_through_the_proxy(proxied: str, browser: Browser) -> None:
    page = visit(browser, f"{proxied}/compare?tokens=4")
    page.get_by_label("Prompt").fill("When does the tide turn, and when can the boats leave the harbour? " * 6)
    main(page).get_by_role("button", name="Compare").click()
    expect(main(page).get_by_text("Measured here").first).to_be_visible(timeout=180 * SECONDS)
    expect(page.get_by_test_id("stException")).to_have_count(0)
    page.close()
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{proxied}/metrics", timeout=10)
