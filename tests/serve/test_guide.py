"""What the guides show runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from danlu.recipe import read_recipe
from tests.serve.conftest import Server

ROOT = Path(__file__).parents[2]


def block(page: str, language: str) -> str:
    """The one example in a language on a page."""
    [example] = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return str(example)


def test_the_guide_s_client(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("docs/serve.md", "python").replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out.strip()


def test_the_readme_s_recipe_is_one_in_both_languages(tmp_path: Path) -> None:
    read = []
    for page in ("README.md", "README.zh-CN.md"):
        file = tmp_path / "recipe.yaml"
        file.write_text(block(page, "yaml"), encoding="utf-8")
        read.append(read_recipe(file).recipe)
    assert read[0] == read[1]


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readme_s_commands_exist(page: str) -> None:
    import typer.main

    from danlu.cli import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = re.findall(r"^danlu (\w+)(.*?)(?:\s{2,}#|$)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name, _ in shown} == set(known)
    for name, rest in shown:
        command = known[name]
        if hasattr(command, "commands"):
            first = rest.split()[0]  # or the group's own, which need not be named
            command = command.commands[first if first in command.commands else command.default]
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options
