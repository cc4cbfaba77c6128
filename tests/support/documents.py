"""The code that README.md and docs/ show, for the tests that run it."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"<!-- test: ([^>]*) -->\s*$")


class Block(NamedTuple):
    page: str  # "docs/quickstart.md"
    line: int
    language: str
    code: str
    directive: str  # what a hidden comment in front of the block says about its test


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        indent, language, code = match.groups()
        directive = _DIRECTIVE.search(text[: match.start()])
        found.append(
            Block(
                page.relative_to(ROOT).as_posix(),
                text.count("\n", 0, match.start()) + 2,
                language,
                re.sub(rf"^{indent}", "", code, flags=re.MULTILINE),
                directive[1] if directive else "",
            )
        )
    return found


def block(page: str, heading: str, language: str) -> str:
    """The first block of a language under the line `heading` of a page, before the next heading."""
    text = (ROOT / page).read_text()
    start = f"\n{heading}\n"
    assert text.count(start) == 1, f"{page} needs the line {heading!r} once"
    section = re.split(r"\n##+ ", text.partition(start)[2])[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no {language} block under {heading!r}"
    return found.group(1)


def sides(diff: str) -> tuple[str, str]:
    """The code before and after a diff."""
    lines = diff.splitlines()
    assert all(line[:1] in ("", " ", "+", "-") for line in lines), diff
    before = [line[1:] for line in lines if not line.startswith("+")]
    after = [line[1:] for line in lines if not line.startswith("-")]
    return "\n".join(before), "\n".join(after)


def recipe(option: str) -> list[str]:
    """The arguments of the recipe that has this option: `multilora` runs with them."""
    lines = block("docs/guides/command_line.md", "## Recipes", "bash").splitlines()
    [line] = [line for line in lines if f" {option} " in line]
    program, *arguments = shlex.split(line)
    assert program == "multilora"
    return arguments
