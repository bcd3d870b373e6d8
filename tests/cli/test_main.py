"""What ``gradprune`` itself does, before any of its commands."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from gradprune.cli.main import COMMANDS, build_parser, main

LOADED = """
import sys
from gradprune.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(*{"torch", "numpy"} & sys.modules.keys(), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_needs_no_torch(arguments: list[str]):
    done = subprocess.run([sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "", done.stderr


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name, help in COMMANDS.items():
        assert f"{name:<8}" in text
        assert help in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_of_its_name(name: str, capsys: pytest.CaptureFixture[str]):
    assert callable(import_module(f"gradprune.cli.{name}").configure)
    with pytest.raises(SystemExit) as ended:
        build_parser([name]).parse_args([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: gradprune {name}")


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["inspekt"])
    assert ended.value.code == 2
    assert "invalid choice: 'inspekt'" in capsys.readouterr().err
