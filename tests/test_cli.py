"""The command: verbs, their help, and mistakes told in a sentence."""

import subprocess
import sys

import pytest

from drafttrain import __version__, cli
from drafttrain.config import REPOSITORY


def run(capsys, *words):
    try:
        cli.main(list(words))
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_verb_it_lists_them(capsys, words):
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert all(verb in out and text in out for verb, (_, text) in cli.VERBS.items())


def test_the_version(capsys):
    assert run(capsys, "--version") == (0, f"drafttrain {__version__}\n", "")


def test_a_misspelt_verb_names_the_nearest(capsys):
    code, _, err = run(capsys, "evalute")
    assert code == 2 and err == "drafttrain: there is no drafttrain evalute; did you mean evaluate?\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(capsys, verb):
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0 and f"usage: drafttrain {verb}" in out


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "compare"])
def test_every_verb_is_strict(capsys, verb):
    code, _, err = run(capsys, verb, "--run", "r", "--target.pth", "x")
    assert code == 2 and err.endswith("did you mean --target.path?\n") and err.count("\n") == 1


def test_export_has_its_short_flags(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "parse", lambda *arguments, **keywords: seen.append(arguments) or pytest.skip("seen"))
    with pytest.raises(pytest.skip.Exception):
        cli._export(["--to", "vllm"])
    assert seen[0][3] == {"--to": "--export.to", "--output": "--export.output"}


def test_help_answers_without_torch():
    code = (
        "import sys; from drafttrain.cli import main\n"
        "try: main(['evaluate', '--help'])\n"
        "except SystemExit as stop: sys.exit(stop.code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.DEVNULL).returncode == 0
