"""The About page: facts are read from this process, nothing private is shown."""

import re
import socket
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from app.about import facts as about
from app.config import AppConfig
from app.ui import definitions
from turboquant.records.metrics import metric
from turboquant.run.threads import affinity


def test_every_definition_is_in_the_table() -> None:
    table = about.defined()
    texts = [value for name, value in vars(definitions).items() if name.isupper() and isinstance(value, str)]
    texts += [metric(name).help for names in definitions.FIGURES.values() for name in names]
    assert sorted(table["meaning"]) == sorted(texts)
    assert table["figure"].is_unique


def test_surroundings_name_versions_but_neither_host_nor_folders() -> None:
    found = about.surroundings()
    assert re.match(r"\d+\.\d+", found["PyTorch"])
    assert re.match(r"\d+\.\d+", found["Streamlit"])
    assert int(found["CPU threads"]) >= 1
    assert found["CPUs for this app"].startswith(str(affinity()))
    assert re.match(r"(triton|numba) \d|torch", found["Compressed attention by"])
    said = " ".join(found.values())
    assert socket.gethostname() not in said
    assert "/" not in said
    assert str(Path.home()) not in said


def test_a_containers_quota_is_said() -> None:
    assert about._processors(8, None) == "8"
    assert about._processors(8, 1.5) == "8, with the time of 1.5 (the container's quota)"


def test_limits_are_those_of_the_deployment() -> None:
    config = AppConfig(models=("org/name", "/srv/models/secret"), allow_any_model=False, max_queue=3, max_new_tokens=77)
    found = about.limits(config, 20)
    assert found["Models"] == "org/name, secret; no others"
    assert found["Longest answer"] == "77 tokens"
    assert found["Runs that may wait"].startswith("3;")
    assert "srv" not in " ".join(found.values())
    assert "any model of the hub" in about.limits(AppConfig(), 20)["Models"]


def test_privacy_names_the_times_of_the_deployment() -> None:
    said = " ".join(about.privacy(AppConfig(disconnect_grace_s=7), 91))
    assert "7 seconds" in said
    assert "91 seconds" in said


def test_licences_are_those_of_the_installed_packages() -> None:
    table = about.licences().set_index("what")
    assert table.loc["TurboQuant Lab", "licence"] == "Apache-2.0"
    assert "BSD" in table.loc["torch", "licence"]
    assert "Apache" in table.loc["streamlit", "licence"]
    assert not (table["licence"] == "not stated").any()
    assert table["licence"].str.len().max() <= 120


def test_credits_are_whole_and_the_readme_names_the_same_papers() -> None:
    for credit in about.CREDITS:
        assert re.fullmatch(r"\d{4}\.\d{5}", credit.arxiv)
        assert credit.link.endswith(credit.arxiv)
        assert 2000 + int(credit.arxiv[:2]) == credit.year
        assert credit.used.count(".") >= 2
    assert len({credit.arxiv for credit in about.CREDITS}) == len(about.CREDITS)
    readme = (Path(__file__).resolve().parents[3] / "README.md").read_text()
    named = set(re.findall(r"\b2\d{3}\.\d{5}\b", readme))
    assert named <= {credit.arxiv for credit in about.CREDITS}


@pytest.mark.parametrize("link", [{}, {"bits": "nonsense", "temperature": "-7"}])
def test_a_cold_link_shows_every_section(page: AppTest, link: dict[str, str]) -> None:
    for name, value in link.items():
        page.query_params[name] = value
    page.run().switch_page("../pages/about.py").run()
    assert not page.exception
    heads = [str(header.value) for header in page.header]
    for title in ("What each number means", "What this app does not show", "Privacy", "Credits", "Licences"):
        assert title in heads
    said = "\n".join(str(part.value) for part in page.markdown)
    assert "arXiv:2504.19874" in said
    assert "Prompts and answers are not logged" in said
    assert len(page.table) == 4
    page.selectbox(key="about_page").set_value("All pages").run()
    assert len(page.table[0].value) == len(about.defined())
