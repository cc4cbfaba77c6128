"""The code that the README shows, for the tests that run it."""

import re
import shlex
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def block(heading: str, language: str) -> str:
    """The first block of a language under the line `heading`, before the next heading."""
    text = README.read_text()
    start = f"\n{heading}\n"
    assert text.count(start) == 1, f"README.md needs the line {heading!r} once"
    section = re.split(r"\n##+ ", text.partition(start)[2])[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no {language} block under {heading!r}"
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
    lines = block("### Recipes", "bash").splitlines()
    [line] = [line for line in lines if f" {option} " in line]
    program, *arguments = shlex.split(line)
    assert program == "multilora"
    return arguments
