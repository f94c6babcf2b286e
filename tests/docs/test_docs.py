"""Documentation: snippets run as a reader would type them, commands parse, files exist, and the site builds."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from qstar_decoding.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = {page.relative_to(ROOT).as_posix(): page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
SNIPPET = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?^```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = typer.main.get_command(app)


def snippets(page):
    """Return the page's Python that is meant to be run, in order."""
    found = []
    for match in SNIPPET.finditer(PAGES[page].read_text(encoding="utf-8")):
        mark, code = match["mark"] or "", match["code"]
        if mark.startswith("not run: "):
            continue
        if mark.startswith("examples/"):  # test_examples.py runs these; later snippets need their imports
            code = "\n".join(re.findall(r"^(?:import|from) .*", code, re.MULTILINE))
        found.append(code)
    return found


@pytest.mark.filterwarnings("ignore:.*(upper bound|cannot be pickled)")
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_every_snippet_runs(page, tmp_path, monkeypatch):
    from qstar_decoding.agents import QStarConfig

    monkeypatch.chdir(tmp_path)
    # What is shown has to work; to be good, it would have to train for minutes.
    for name, value in {"searches_per_round": 2, "tokens_per_search": 24, "gradient_steps": 2}.items():
        monkeypatch.setitem(QStarConfig.__init__.__kwdefaults__, name, value)
    names = {"__name__": "docs"}
    for code in snippets(page):
        exec(compile(re.sub(r"\.learn\(\d\d+_000", ".learn(20", code), page, "exec"), names)


def test_few_snippets_are_not_run():
    marks = [(page, match["mark"]) for page in PAGES for match in SNIPPET.finditer(PAGES[page].read_text("utf-8"))]
    skipped = [(page, mark) for page, mark in marks if (mark or "").startswith("not run")]
    assert len(skipped) <= 4, skipped


def commands(page):
    """Return the page's calls of qstar in shell blocks, as lists of arguments."""
    found = []
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL):
        lexer = shlex.shlex(block.replace("\\\n", " ").replace("\n", "\n;\n"), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>"):
                if command and Path(command[0]).name == "qstar":
                    found.append(command[1:])
                command = []
            elif word != "$":
                command.append(word)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_parses(page):
    for arguments in commands(page):
        try:
            if arguments[0].startswith("-"):
                COMMAND.make_context("qstar", arguments)
            else:
                COMMAND.commands[arguments[0]].make_context(arguments[0], arguments[1:])
        except typer.Exit:  # --help
            pass
    # Those within a sentence may leave something out, but name nothing that is not there.
    for inline in re.findall(r"`qstar ([^`\n]+)`", PAGES[page].read_text(encoding="utf-8")):
        name, *words = inline.split()
        if name.islower() and not name.startswith("-"):
            known = {option for parameter in COMMAND.commands[name].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known | {"--help"}, inline


def test_commands_are_found_and_unknown_options_are_not_taken():
    assert ["decode", "The movie was", "--budget", "200", "--n", "3"] in commands("docs/command-line.md")
    with pytest.raises(typer.TyperException, match="--bugdet"):
        COMMAND.commands["decode"].make_context("decode", ["The movie was", "--bugdet", "200"])


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_is_there(page):
    rooms = "agents|benchmarks|cli|docs|envs|examples|explorer|models|rewards|tasks|tests"
    for name in re.findall(rf"\b((?:{rooms})/[\w./-]+\.(?:py|md|yaml|yml|html))\b", PAGES[page].read_text("utf-8")):
        assert (ROOT / name).is_file(), name


def test_the_site_builds_without_a_warning_and_asks_nobody_else(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    result = subprocess.run(build, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in tmp_path.rglob("*.html")}
    assert "AStarPlanner" in pages["reference/agents.html"]
    assert "--max-new-tokens" in pages["reference/cli.html"]
    assert "best-of-n" in pages["index.html"]
    for page, text in pages.items():
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\" >]+)", text)
        assert not loaded, (page, loaded)
