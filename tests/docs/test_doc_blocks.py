"""The blocks of README.md and docs/ run, as a reader would type them from top to bottom."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import stand_ins

import documents
from documents import PAGES, ROOT, Block, blocks
from multilora.app import cli

KINDS = ("", "with", "in", "options")
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
ALL = [block for page in PAGES for block in blocks(page)]
#: These blocks have separate tests, which also look at their output.
OWN = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]
PYTHON = [p for p in PAGES if p not in OWN and any(b.language == "python" for b in blocks(p))]
SHELL = [block for block in ALL if block.language == "bash"]


def title(block: Block) -> str:
    return f"{block.page}:{block.line}"


def kind(block: Block) -> tuple[str, list[str]]:
    """The first word of a block's directive, and the others."""
    first, *others = block.directive.split() or [""]
    return first, others


def test_every_page_has_known_directives():
    assert len(PAGES) > 20 and len(ALL) > 30
    for block in ALL:
        assert kind(block)[0] in KINDS, title(block)


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": "__main__"}
    for block in blocks(page):
        what, names = kind(block)
        if block.language != "python" or what == "in":
            continue
        for name in names:
            scope |= getattr(stand_ins, name)()
        # Lines of a traceback are those of the page.
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, str(page), "exec"), scope)


def test_the_readme_loop_learns(tmp_path, monkeypatch, capsys):
    """The numbers that it prints are of held-out images, and good."""
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(documents.block("README.md", "## The loop", "python"), scope)
    [measures] = [eval(line) for line in capsys.readouterr().out.splitlines() if "nll" in line]
    assert measures["num_examples"] == len(scope["held_out"]) > 500
    assert measures["accuracy"] > 0.9
    assert len(list((tmp_path / "particles").glob("particle_*"))) == 4


def test_the_loaded_particles_of_the_quickstart_are_the_saved_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in blocks(ROOT / "docs" / "quickstart.md"):
        if block.language == "python":
            exec(block.code, scope)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "torch.Size([4, 3, 5])" and out[-1] == "True"
    assert scope["measures"]["accuracy"] > 0.8


@pytest.mark.parametrize(
    "block", [b for b in ALL if b.language in ("python", "diff", "bash")], ids=title
)
def test_blocks_that_run_elsewhere_do(block):
    what, files = kind(block)
    if what != "in":
        assert block.language != "diff", "only a separate test can run a diff"
        return
    for file in files:
        text = (ROOT / file).read_text()
        assert Path(block.page).name in text or "recipe(" in text, (title(block), file)


# --- shell blocks --------------------------------------------------------------------------------


def commands(block: Block) -> list[list[str]]:
    """The words of each command, without comments and the path of the environment."""
    lines = block.code.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if line.startswith("#"):
            continue
        for command in re.split(r"&&|;", line):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                found.append([re.sub(r"^\S*/bin/", "", words[0]), *words[1:]])
    return found


@pytest.mark.parametrize("block", SHELL, ids=title)
def test_shell_commands_exist(block, capsys):
    for program, *arguments in commands(block):
        if program == "multilora":
            cli._parser().parse_args(arguments)
        elif program in ("python", "python3"):
            python(arguments)
        elif program in ("pip", "pytest", "mkdocs", "torchrun", "pre-commit"):
            files = [a for a in arguments if a.startswith(("tests/", "docs/", "examples/"))]
            assert all((ROOT / file).exists() for file in files), files
            assert_extras_exist(arguments)
        else:
            raise AssertionError(f"{title(block)}: the program {program!r}")


def python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        module = arguments[1]
        if module in ("venv", "build", "pytest"):
            return
        spec = importlib.util.find_spec(module)
        assert spec, module
        file = Path(spec.origin)
        source = (file.with_name("__main__.py") if file.name == "__init__.py" else file).read_text()
        options = [a for a in arguments[2:] if a.startswith("--")]
        known = re.findall(r"--\w[\w-]*", source)
        assert set(options) <= set(known), (module, options)
    elif arguments[0] != "-c":
        assert (ROOT / arguments[0]).is_file(), arguments[0]


def assert_extras_exist(arguments: list[str]) -> None:
    known = (ROOT / "pyproject.toml").read_text()
    for argument in arguments:
        for extras in re.findall(r"\[([\w,]+)\]$", argument):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", known, re.MULTILINE), argument


@pytest.mark.slow
def test_commands_of_the_quickstart_run(tmp_path, monkeypatch, capsys):
    """With few steps: the numbers are looked at elsewhere."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for block in blocks(ROOT / "docs" / "quickstart.md"):
        if block.language != "bash" or kind(block)[0] == "options":
            continue
        for program, *arguments in commands(block):
            assert program == "multilora"
            if arguments[0] == "train":
                arguments += ["--steps", "2"]
            assert cli.main(arguments) == 0, capsys.readouterr().err
            ran.append(arguments[0])
    assert ran == ["info", "train", "evaluate"]
    for name in ("reliability.png", "entropies.png", "particle_0", "particle_3", "metrics.json"):
        assert (tmp_path / "runs" / "first" / name).exists()
