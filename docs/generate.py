"""Generated parts of the documentation: tables in the pages, the drawing, and the pictures of real runs.

``python docs/generate.py`` (or ``make pictures``) rewrites what is stale, ``--all`` everything. The tests of
``tests/docs`` fail while something is stale. docs/pictures.json records what each picture was made from.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RECORD = DOCS / "pictures.json"
ROOMS = ("models", "rewards", "envs", "tasks", "agents", "serve", "explorer", "cli")

# -- tables: each stands in its page between <!-- generated: NAME --> and <!-- end -->


def sources() -> Iterator[Path]:
    """Yield the modules of the package, room by room, from the bottom up."""
    yield from sorted(path for path in ROOT.glob("*.py") if path.stem not in ("setup", "conftest"))
    for room in ROOMS:
        folders = sorted({path.parent for path in (ROOT / room).rglob("*.py")})
        for folder in folders:
            yield from sorted(folder.glob("*.py"))


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, as Markdown."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z)`*\"'0-9]\.) (?=[A-Z`])", paragraph)[0]
    sentence = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", sentence).replace("``", "`").replace("|", "\\|")
    # An asterisk outside of code would begin an emphasis.
    return "`".join(part if i % 2 else part.replace("*", r"\*") for i, part in enumerate(sentence.split("`")))


def modules() -> str:
    """Return the table of all files with one purpose each."""
    rows = ["| file | purpose |", "|---|---|"]
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        if path.name == "__init__.py":
            room = "the package" if path.parent == ROOT else f"`{name.removesuffix('__init__.py')}`"
            rows.append(f"| **{room}** | {first_sentence(path)} |")
        elif path.name != "__main__.py":
            rows.append(f"| `{name}` | {first_sentence(path)} |")
    return "\n".join(rows)


def layers() -> str:
    """Return the allowed imports, as tests/test_architecture.py enforces them."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    found = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "LAYERS"
    )
    rows = ["| layer | rooms and modules |", "|---:|---|"]
    for number, names in enumerate(ast.literal_eval(found), start=1):
        rows.append(f"| {number} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(rows)


def decoders() -> str:
    """Return the decoders of a comparison: names, class, source, what they look at, and what is tuned."""
    from qstar_decoding.agents.planning.registry import CONTENDERS

    looks_at = {"lm": "language model", "reward": "reward", "potential": "reward of prefixes", "q": "reward, Q"}
    rows = ["| decoder | `qstar decode` | class | source | looks at | tuned |", "|---|---|---|---|---|---|"]
    for name, spec in CONTENDERS.items():
        shown, source = (text.replace("*", "\\*") for text in (name, spec.source))
        kind = getattr(spec.kind, "__name__", str(spec.kind))
        tuned = ", ".join(sorted({f"`{key}`" for setting in spec.grid for key in setting}))
        command = f"`{spec.command}`" if spec.command else ""
        rows.append(f"| {shown} | {command} | `{kind}` | {source} | {looks_at[spec.uses]} | {tuned} |")
    return "\n".join(rows)


def tasks() -> str:
    """Return the tasks that the package ships."""
    from qstar_decoding.tasks import load_task, task_names

    rows = ["| task | description | reward | k | tokens | α |", "|---|---|---|---:|---:|---:|"]
    for name in task_names():
        task = load_task(name)
        env = {"reward": "sentiment", "top_k": 8, "max_new_tokens": 24, "logprob_weight": 0.02, **task.env}
        numbers = f"{env['top_k']} | {env['max_new_tokens']} | {env['logprob_weight']:g}"
        rows.append(f"| `{name}` | {task.description.replace('*', chr(92) + '*')} | `{env['reward']}` | {numbers} |")
    return "\n".join(rows)


def observation() -> str:
    """Return the parts of an observation."""
    from qstar_decoding.envs.observations import observation_table

    return observation_table().replace("``", "`")


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "modules": ("architecture.md", modules),
    "layers": ("architecture.md", layers),
    "observation": ("environment.md", observation),
    "decoders": ("evaluate.md", decoders),
    "tasks": ("reference/tasks.md", tasks),
}


def with_table(page: str, name: str, table: str) -> str:
    """Return a page's text with one generated table put between its two marks."""
    pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)"
    if len(re.findall(pattern, page, re.DOTALL)) != 1:
        raise ValueError(f"the page has not exactly one pair of <!-- generated: {name} --> and <!-- end -->")
    return re.sub(pattern, lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page, flags=re.DOTALL)


def stale_tables() -> list[str]:
    """Return the names of the tables that are not what the code says."""
    pages = {name: (DOCS / page).read_text(encoding="utf-8") for name, (page, _) in TABLES.items()}
    return [name for name, (_, make) in TABLES.items() if with_table(pages[name], name, make()) != pages[name]]


# -- the drawing: boxes on a grid, arrows between them

BLUE, ORANGE, GREEN, VIOLET, GREY = (
    ("#e4ecfb", "#3457b1"),
    ("#fdeedd", "#b45309"),
    ("#e3f4ec", "#0f766e"),
    ("#f1e9fb", "#6d28d9"),
    ("#f4f4f6", "#6b7280"),
)
LEGEND = (
    (VIOLET, "models/ language models"),
    (ORANGE, "rewards/ scores of texts"),
    (BLUE, "envs/ decoding as an MDP"),
    (GREEN, "agents/ search, learning"),
)
# name: column, row, colour, title, subtitle
BOXES = {
    "prompt": (0, 0, GREY, "prompt", "text or chat"),
    "problem": (1, 0, GREEN, "Problem", "MDP, heuristic, scope"),
    "search": (2, 0, GREEN, "Search", "open edges, LB, UB"),
    "plan": (3, 0, GREY, "Plan", "text, J, LB, UB, tree"),
    "strategy": (3, 1, GREEN, "strategy", "AStarPlanner.select"),
    "loop": (2, 1, GREEN, "loop", "one forward a step"),
    "heuristic": (1, 1, GREEN, "heuristic", "h(s, a): bound or Q"),
    "agent": (0, 1, GREEN, "agent", "DQN, QStar"),
    "observation": (0, 2, BLUE, "observation", "of one state"),
    "mdp": (1, 2, BLUE, "DecodingMDP", "mask, α·log π, the end"),
    "tree": (2, 2, BLUE, "TokenTree", "each prefix once"),
    "reward": (1, 3, ORANGE, "reward", "r(x, y), φ, r_max"),
    "engine": (2, 3, VIOLET, "Engine", "language model, KV cache"),
}
# from, to, label, both ways
ARROWS = (
    ("prompt", "problem", "", False),
    ("problem", "search", "", False),
    ("search", "plan", "", False),
    ("strategy", "loop", "edges", False),
    ("loop", "search", "results", False),
    ("loop", "heuristic", "nodes", True),
    ("loop", "tree", "new tokens", True),
    ("agent", "heuristic", "Q", False),
    ("observation", "agent", "", False),
    ("mdp", "observation", "", False),
    ("tree", "mdp", "", False),
    ("mdp", "reward", "texts", True),
    ("tree", "engine", "token ids", True),
)


def drawing() -> str:
    """Return architecture.svg: from a prompt to a plan."""
    wide, high, step_x, step_y, left, top = 170, 62, 232, 112, 24, 66
    width, height = left * 2 + 3 * step_x + wide, top + 3 * step_y + high + 24

    def corner(name: str) -> tuple[int, int]:
        column, row = BOXES[name][:2]
        return left + column * step_x, top + row * step_y

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="t" '
        'font-family="system-ui, sans-serif">',
        '<title id="t">From a prompt to a plan: the parts, and what they hand to each other</title>',
        '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="#4b5563"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
    ]
    for i, ((fill, stroke), text) in enumerate(LEGEND):
        x = left + i * step_x
        parts.append(f'<rect x="{x}" y="20" width="14" height="14" rx="3" fill="{fill}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x + 21}" y="32" font-size="13" fill="#1f2937">{text}</text>')
    for start, end, label, both in ARROWS:
        (x1, y1), (x2, y2) = corner(start), corner(end)
        if y1 == y2:
            forward = x2 > x1
            ax, bx = (x1 + wide, x2 - 2) if forward else (x1, x2 + wide + 2)
            ay = by = y1 + high // 2
            tx, ty, anchor = (ax + bx) / 2, ay - 7, "middle"
        else:
            down = y2 > y1
            ay, by = (y1 + high, y2 - 2) if down else (y1, y2 + high + 2)
            ax = bx = x1 + wide // 2
            tx, ty, anchor = ax + 8, (ay + by) / 2 + 4, "start"
        back = ' marker-start="url(#a)"' if both else ""
        line = f'<path d="M{ax} {ay}L{bx} {by}" fill="none" stroke="#4b5563" stroke-width="1.5"'
        parts.append(f'{line} marker-end="url(#a)"{back}/>')
        if label:
            anchored = f'x="{tx:g}" y="{ty:g}" font-size="12" fill="#4b5563" text-anchor="{anchor}"'
            parts.append(f"<text {anchored}>{label}</text>")
    for name, (_, _, (fill, stroke), title, subtitle) in BOXES.items():
        x, y = corner(name)
        shape = f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="8" fill="{fill}" stroke="{stroke}"/>'
        middle = f'x="{x + wide // 2}" text-anchor="middle"'
        parts.append(shape)
        parts.append(f'<text {middle} y="{y + 27}" font-size="15" font-weight="600" fill="#111827">{title}</text>')
        parts.append(f'<text {middle} y="{y + 46}" font-size="12" fill="#374151">{subtitle}</text>')
    return "\n".join([*parts, "</svg>", ""])


# -- pictures of real runs


def digest(*paths: str) -> str:
    """Return a digest of the package's version and of the files that a picture was made from."""
    from qstar_decoding import __version__

    found = hashlib.sha256(__version__.encode())
    for path in paths:
        found.update((ROOT / path).read_bytes())
    return found.hexdigest()[:16]


def inputs(task: str, *others: str) -> tuple[str, ...]:
    """Return the files that a picture of a task with its shipped Q depends on."""
    return f"tasks/{task}.yaml", f"agents/learning/pretrained/{task}/q_network.safetensors", *others


INPUTS: dict[str, tuple[str, ...]] = {
    "demo.svg": inputs("review"),
    "explorer.png": inputs("sentiment", "explorer/page.html"),
    "bounds.svg": inputs("toy"),
}
BUDGET = 200
PROMPTS = 3


def demo_plans(names: tuple[str, ...], prompts: int = PROMPTS) -> list[dict[str, Any]]:
    """Return what `qstar demo` finds, in float32, as rows of the record: decoder, prompt, text, J and its parts."""
    from qstar_decoding.agents import AStarPlanner, BeamSearch, GreedyDecoder, QHeuristic, SamplingDecoder
    from qstar_decoding.agents.evaluation import side_by_side
    from qstar_decoding.models import load_language_model
    from qstar_decoding.tasks import load_task

    task, heuristic = load_task("review"), QHeuristic("review")
    mdp = task.mdp(model=load_language_model("smollm2-135m-instruct", dtype="float32", device="cpu"))
    make: dict[str, Callable[[Any], Any]] = {
        "greedy": GreedyDecoder,
        "beam": BeamSearch,
        "best-of-n": SamplingDecoder,
        "Q*": lambda fresh: AStarPlanner(fresh, heuristic=heuristic, **task.planner),
    }
    found = side_by_side({name: make[name] for name in names}, mdp, task.prompts.of("test")[:prompts], BUDGET)
    rows = []
    for outcomes in zip(*found.values(), strict=True):
        for name, [plan] in zip(names, (outcome.plans for outcome in outcomes), strict=True):
            fields = ("reward", "logprob", "objective", "lower_bound", "upper_bound")
            numbers = {field: round(float(getattr(plan, field)), 3) for field in fields}
            texts = {"decoder": name, "prompt": plan.prompt, "text": plan.text}
            rows.append({**texts, **numbers, "lm_tokens": plan.usage.lm_tokens})
    return rows


def make_demo(path: Path) -> dict[str, Any]:
    """Draw the texts of four decoders on the first held-out prompts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from qstar_decoding.tasks import load_task

    weight = load_task("review").env["logprob_weight"]
    rows = demo_plans(("greedy", "beam", "best-of-n", "Q*"))
    table = Table(title=f"review: J = reward + {weight} · log-prob, at most {BUDGET} LM tokens each")
    for column in ("decoder", "text"):
        table.add_column(column, overflow="fold", min_width=9)
    for column in ("reward", "log-prob", "J", "LM tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        text = Text.assemble((row["prompt"], "dim"), row["text"].replace("\n", "⏎"))
        numbers = f"{row['reward']:.3f}", f"{row['logprob']:.2f}", f"{row['objective']:.3f}", str(row["lm_tokens"])
        is_last = i + 1 == len(rows) or rows[i + 1]["prompt"] != row["prompt"]
        table.add_row(row["decoder"], text, *numbers, style="bold" * (row["decoder"] == "Q*"), end_section=is_last)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        screen = Console(highlight=False, record=True, width=120, file=nowhere)
        screen.print(table)
    picture = screen.export_svg(title="qstar demo")
    # A picture that fetches nothing: without rich's web font, the reader's own monospace font is used.
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")
    return {
        "command": f"qstar demo --budget {BUDGET}",
        "model": "smollm2-135m-instruct, float32",
        "seed": 0,
        "rows": rows,
    }


def make_bounds(path: Path) -> dict[str, Any]:
    """Plot LB and UB of one search on the toy task until they meet."""
    from qstar_decoding.agents import AStarPlanner
    from qstar_decoding.agents.evaluation import plot_traces, save
    from qstar_decoding.tasks import load_task

    task = load_task("toy")
    prompt = task.prompts.of("test")[0]
    plan = AStarPlanner(task.mdp(logprob_weight=0.5)).plan(prompt)
    save(plot_traces({"": plan.trace}), path)
    return {"prompt": prompt, "lm_tokens": plan.usage.lm_tokens, "objective": round(plan.objective, 4)}


def make_explorer(path: Path) -> dict[str, Any]:
    """Use the explorer in a browser, and take a picture of its page without the seconds."""
    import uvicorn
    from playwright.sync_api import sync_playwright

    from qstar_decoding.explorer.server import create_app

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(create_app(), log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with sync_playwright() as playwright:
                executable = (
                    os.environ.get("QSTAR_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
                )
                browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
                page = browser.new_page(viewport={"width": 1280, "height": 1000})
                page.set_default_timeout(300_000)  # a busy machine takes minutes to load the language model
                page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}")
                page.locator("#go:enabled").click()  # task sentiment, its first held-out prompt, A* on the shipped Q
                page.locator(".card a[download]").wait_for()
                page.click("text=Open the tree")
                page.locator(".tree .item.best").nth(3).click()
                page.locator(".side b:not(:empty)").wait_for()
                page.evaluate(
                    "document.querySelectorAll('span').forEach(e => { if (!e.children.length)"
                    " e.textContent = e.textContent.replace(/, [0-9.]+ s$/, '') })"
                )
                page.screenshot(path=path)
                browser.close()
        finally:
            server.should_exit = True
            thread.join()
    return {"command": "qstar explore"}


PICTURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "demo.svg": make_demo,
    "bounds.svg": make_bounds,
    "explorer.png": make_explorer,
}


def record() -> dict[str, Any]:
    """Return what is known of each picture."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    return found


def stale_pictures() -> list[str]:
    """Return the names of the pictures that are missing, or made from other files than today's."""
    known = record()
    stale = [
        name
        for name, inputs in INPUTS.items()
        if not (DOCS / name).is_file() or known.get(name, {}).get("digest") != digest(*inputs)
    ]
    drawn = DOCS / "architecture.svg"
    is_drawn = drawn.is_file() and drawn.read_text(encoding="utf-8") == drawing()
    return stale if is_drawn else ["architecture.svg", *stale]


def main() -> None:
    """Rewrite what is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="make all pictures anew")
    parser.add_argument("--tables", action="store_true", help="the tables only, which takes a second")
    options = parser.parse_args()
    for name in stale_tables():
        page, make = TABLES[name]
        text = (DOCS / page).read_text(encoding="utf-8")
        (DOCS / page).write_text(with_table(text, name, make()), encoding="utf-8")
        print(f"docs/{page}: table of {name}")
    if options.tables:
        return
    (DOCS / "architecture.svg").write_text(drawing(), encoding="utf-8")
    made_at = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": _commit()}
    for name in PICTURES if options.all else [name for name in stale_pictures() if name in PICTURES]:
        about = PICTURES[name](DOCS / name)
        content = {**record(), name: {"digest": digest(*INPUTS[name]), **made_at, **about}}
        RECORD.write_text(json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"docs/{name}")


def _commit() -> str:
    called = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return called.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
