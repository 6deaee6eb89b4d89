"""The documentation names nothing that is not there: no dead link, no file, key or test that does not exist."""

import ast
import re
from pathlib import Path

import pytest

from vmd_scale.config_reference import markdown

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


PROGRAMS = sorted(path for folder in ("launchers", "benchmarks", "tokenizer") for path in (ROOT / folder).rglob("*.py"))


def said_in(page: Path) -> str:
    """A page, or how a program says that it is called."""
    text = page.read_text()
    return text if page.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""


def names_in(path: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_into_a_page_lead_to_a_heading(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert anchor in anchors_of(page.parent / target if target else page), anchor


@pytest.mark.parametrize("page", [*PAGES, *PROGRAMS], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    """In backquotes or in a command: what begins with one of our folders and has an ending."""
    folders = "vmd_scale|launchers|configs|tokenizer|tests|benchmarks"
    for name in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w/.-]*\w\.(?:py|json|md|sh|sbatch))\b", said_in(page)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_are_named_exist(page):
    for file, name in re.findall(r"`(?:tests/unit/)?(test_\w+\.py)::(test_\w+)`", page.read_text()):
        assert name in names_in(ROOT / "tests" / "unit" / file), name


def test_the_configuration_reference_is_that_of_the_code():
    """Else: python -m vmd_scale.config_reference > docs/configuration.md"""
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown()


def test_every_key_of_the_configuration_says_what_it_means():
    assert not [line for line in markdown().splitlines() if line.endswith("|  |")]
