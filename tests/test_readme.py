"""The documentation: its commands parse, its Python compiles, its links lead somewhere, every option is explained."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from auto_round import cli
from auto_round.config import PARTS, RunConfig

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "step_by_step.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
COMMANDS = {
    "auto-round": cli.main,
    "auto-round-best": lambda words: cli.main(words, recipe="best"),
    "auto-round-light": lambda words: cli.main(words, recipe="light"),
    "auto-round-eval": cli.main_eval,
}


def code_blocks(language: str, pages: list[Path]) -> list[tuple[str, str]]:
    """Returns (page and number, content) of the code blocks in a language."""
    found = []
    for page in pages:
        blocks = [text for name, text in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]
        found += [(f"{page.name}-{number}", text) for number, text in enumerate(blocks, 1)]
    return found


def commands() -> list[list[str]]:
    """Returns the words of each call of this package's commands, one under torchrun included."""
    found = []
    for _, text in code_blocks("bash", [ROOT / "README.md", GUIDE]):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["torchrun"]:
                words = ["auto-round", *words[words.index("auto_round") + 1 :]]
            if words and words[0].startswith("auto-round"):
                found.append(words)
    return found


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_of_the_docs_is_accepted(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layers.json").write_text('{"down_proj": 8}', encoding="utf-8")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that the command does not set it for later tests
    monkeypatch.setattr(cli, "_run", lambda *_args, **_options: 0)
    monkeypatch.setattr(cli, "_evaluate", lambda *_args, **_options: None)
    status = COMMANDS[words[0]](words[1:])
    assert status == 0, capsys.readouterr().err


def test_docs_show_the_main_commands() -> None:
    shown = {(words[0], words[1] if len(words) > 1 and not words[1].startswith("-") else "") for words in commands()}
    wanted = {("auto-round", ""), ("auto-round", "plan"), ("auto-round", "list"), ("auto-round", "eval")}
    assert wanted <= shown


@pytest.mark.parametrize("code", [pytest.param(text, id=name) for name, text in code_blocks("python", PAGES)])
def test_python_of_the_docs_compiles(code: str) -> None:
    compile(code, "docs", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_docs_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("owner", [RunConfig, *PARTS.values()], ids=lambda owner: owner.__name__)
def test_every_option_is_in_the_guide(owner: type) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    flags = []
    for field in dataclasses.fields(owner):
        if field.metadata:
            flags += [f"--{field.name}", *field.metadata["flags"], *filter(None, [field.metadata["off"]])]
    assert not [flag for flag in flags if f"`{flag}`" not in text]


def test_every_flag_of_the_parser_is_in_the_guide() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    flags = [flag for action in cli.quantize_parser()._actions for flag in action.option_strings]
    missing = [flag for flag in flags if flag not in text and flag not in ("-h", "--help")]
    assert not missing


def test_scripts_that_the_readme_names_exist() -> None:
    named = re.findall(r"bash (scripts/\S+\.sh)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert named
    assert all((ROOT / name).is_file() for name in named)
