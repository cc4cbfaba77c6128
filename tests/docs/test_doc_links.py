"""Links and file names in README.md and docs/ lead somewhere."""

import re

import pytest
import yaml

import multilora as ml
from documents import PAGES, ROOT
from multilora.methods import METHODS
from multilora.methods.base import Method
from multilora.ops import dispatch

LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
# Files that the text names, in backticks, by their folder.
NAMED = re.compile(r"`((?:multilora|docs|bench|tests|csrc|examples|\.ci)/[\w./*-]+)`")
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "examples" / "README.md"]


def anchors(page) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    slugs = (re.sub(r"[^\w\s-]", "", h.lower()).strip() for h in headings)
    return {re.sub(r"\s+", "-", slug) for slug in slugs}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_named_files_exist(page):
    for name in NAMED.findall(page.read_text()):
        found = list(ROOT.glob(name.rstrip("/")))
        assert found, f"{page} names {name}"


def test_named_functions_exist():
    owners = {"IBDR": ml.IBDR, "Method": Method, "dispatch": dispatch}
    found = 0
    for page in PAGES:
        for owner, name in re.findall(r"`(IBDR|Method|dispatch)\.(\w+)", page.read_text()):
            assert hasattr(owners[owner], name), f"{page} names {owner}.{name}"
            found += 1
    assert found >= 5


@pytest.mark.parametrize("page", ["docs/guides/choosing_a_method.md", "docs/papers.md"])
def test_pages_name_the_methods(page):
    """The names are those of the registry; the guide has all of them."""
    text = (ROOT / page).read_text()
    named = set(re.findall(r"--method (\w+)", text)) - {"NAME"}
    if page.startswith("docs/guides"):
        named = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
        assert named == METHODS.keys()
    assert len(named) > 10 and named <= METHODS.keys()


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        entries = entry.values() if isinstance(entry, dict) else entry
        return [page for inner in entries for page in pages(inner)]

    listed = pages(nav)
    written = [p.relative_to(ROOT / "docs").as_posix() for p in PAGES if p.name != "README.md"]
    assert sorted(listed) == sorted(written)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140
