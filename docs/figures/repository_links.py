"""A hook of mkdocs: files of the repository that pages link to come with the site.

On the repository's own pages a link such as ../bench/results/x.json leads out of docs/. The site
has those files under repository/, as they are; Markdown becomes a page.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent.parent
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")


def _place(page: str) -> str:
    """Where a page of the site lies in the repository."""
    return page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"


def _on_site(path: str) -> str:
    """Where a file of the repository lies on the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def _targets(page: str, text: str) -> list[str]:
    """The files of the repository that the page links to."""
    folder = posixpath.dirname(_place(page))
    paths = [posixpath.normpath(posixpath.join(folder, m[2])) for m in LINK.finditer(text)]
    return [path for path in paths if (ROOT / path).is_file()]


def on_files(files, config):
    waiting = [f for f in files.documentation_pages() if not f.src_uri.startswith("figures/")]
    while waiting:
        page = waiting.pop()
        for path in _targets(page.src_uri, page.content_string):
            place = _on_site(path)
            if path.startswith("docs/") or files.get_file_from_path(place):
                continue
            added = File.generated(config, place, content=(ROOT / path).read_bytes())
            files.append(added)
            if place.endswith(".md"):
                waiting.append(added)
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    folder = posixpath.dirname(_place(here))

    def moved(match):
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if not (ROOT / path).is_file():
            return match[0]
        link = posixpath.relpath(_on_site(path), posixpath.dirname(here) or ".")
        return f"{match[1]}{link}{match[3] or ''}{match[4]}"

    return LINK.sub(moved, markdown)
