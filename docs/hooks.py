"""Hooks of mkdocs: parts of other files, the command line's help, and links in docstrings."""

import re
from pathlib import Path
from typing import Any

import griffe
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the page of results into the navigation, if there are any."""
    if RESULTS.is_file():
        insights = next(entry["Insights"] for entry in config.nav if "Insights" in entry)
        insights.append({"Results": "results.md"})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of results with its plots, which lie outside of docs/."""
    if RESULTS.is_file():
        files.append(File.generated(config, "results.md", abs_src_path=str(RESULTS)))
        for plot in RESULTS.parent.rglob("*.svg"):
            path = plot.relative_to(RESULTS.parent).as_posix()
            files.append(File.generated(config, path, abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in ``<!-- README: HEADING -->`` and ``<!-- qstar --help -->``."""
    markdown = re.sub(r"<!-- README: (.+) -->", lambda found: readme(found[1]), markdown)
    return re.sub(r"<!-- qstar --help -->", lambda _: command_line(), markdown)


def readme(heading: str) -> str:
    """Return a section of README.md, so that no figure stands in two places."""
    parts = (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")
    if len(parts) != 2:
        raise ValueError(f"README.md has {len(parts) - 1} headings '## {heading}', expected 1; see docs/hooks.py")
    text = parts[1].split("\n## ")[0].replace("](docs/", "](").replace("](benchmarks/RESULTS.md", "](results.md")
    # Footnotes stand at the end of the README.
    notes = dict(re.findall(r"^\[\^(\w+)\]: (.+)$", parts[1], re.MULTILINE))
    text += "".join(f"\n\n[^{name}]: {notes[name]}" for name in re.findall(r"\[\^(\w+)\](?!:)", text))
    # Other files of the repository are not part of the site.
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#|[\w-]+\.(?:md|svg|png))[^)]*\)", r"\1", text).strip()


def command_line() -> str:
    """Return the help of all commands, as Markdown."""
    from qstar_decoding.cli.app import app

    command = typer.main.get_command(app)
    context = command.make_context("qstar", ["tasks"])
    help_of_all = get_docs_for_click(obj=command, ctx=context, name="qstar")
    return "## " + help_of_all.split("\n## ", 1)[1]


class References(griffe.Extension):
    """Turns the Sphinx roles of the docstrings into links where the target is documented, into code elsewhere."""

    ROLE = re.compile(r":(?:class|meth|func|mod|data|attr|exc):`(~?)([\w.]+)`")

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite all docstrings of the package."""
        objects = list(walk(pkg))
        paths = {obj.path for obj in objects}
        by_name: dict[str, str] = {}
        for obj in objects:
            parts = obj.path.split(".")
            for start in range(len(parts)):
                by_name.setdefault(".".join(parts[start:]), obj.path)
        for obj in objects:
            if obj.docstring is None:
                continue

            def link(found: re.Match[str], obj: Any = obj) -> str:
                short, target = found.groups()
                shown = target.rpartition(".")[2] if short else target
                near = [f"{obj.path}.{target}", f"{obj.path.rpartition('.')[0]}.{target}"]
                path = next((p for p in near if p in paths), by_name.get(target, target))
                return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'

            text = self.ROLE.sub(link, obj.docstring.value)
            text = re.sub(r"(\[\w+\])(?=\[\w+\])", r"\1\\", text)  # [n][tokens] is a shape, not a link
            obj.docstring.value = re.sub(r"(?m)(^|\S)::$", lambda m: f"{m[1]}:" if m[1] else "", text)


def walk(obj: Any) -> Any:
    """Yield an object of the package and everything it defines."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from walk(member)
