"""Generated parts of the documentation: tables, drawing and pictures are what the code and a run say today."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from qstar_decoding.rewards import reward_names

ROOT = Path(__file__).parents[2]
REMEDY = "run: make pictures (python docs/generate.py)"
WORDS = """
J | g(s) | h(s, a) | f | U(s, a) | LB | UB | gap | φ(s) | α | γ | k | LM token | node | row | edge | action | prefix |
completion | incumbent | pruning threshold | pin | evict | potential | certified | scope | score | problem | request |
search | strategy | loop | plan | prompt | horizon | heuristic | decoder | planner | engine | taper | margin |
pathmax | prior | reward | gold reward
"""


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_table_is_stale(generate):
    assert generate.stale_tables() == [], REMEDY


def test_a_stale_table_is_found(generate):
    page = "x\n<!-- generated: modules -->\n\nold\n\n<!-- end -->\ny\n"
    assert generate.with_table(page, "modules", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="exactly one pair"):
        generate.with_table("no marks", "modules", "new")


def test_the_table_of_files_has_every_module(generate):
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", generate.modules(), re.MULTILINE)
    rooms = ("agents", "cli", "envs", "explorer", "models", "rewards", "serve", "tasks")
    files = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    wanted = {path.relative_to(ROOT).as_posix() for path in files if not path.stem.startswith("__")}
    assert len(listed) == len(set(listed))
    assert set(listed) == wanted


def test_no_picture_is_stale(generate):
    assert generate.stale_pictures() == [], REMEDY


def test_a_stale_picture_is_found(generate, monkeypatch, tmp_path):
    known = {name: {"digest": "other"} for name in generate.INPUTS}
    (tmp_path / "pictures.json").write_text(json.dumps(known))
    monkeypatch.setattr(generate, "RECORD", tmp_path / "pictures.json")
    monkeypatch.setattr(generate, "drawing", lambda: "another drawing")
    assert generate.stale_pictures() == ["architecture.svg", *generate.INPUTS]


def test_every_picture_of_the_pages_is_made_by_the_command(generate):
    made = {"architecture.svg", *generate.PICTURES}
    assert set(generate.PICTURES) == set(generate.INPUTS)
    shown = set()
    for page in (ROOT / "docs").glob("*.md"):
        shown |= set(re.findall(r"!\[[^\]]*\]\(([\w.-]+)\)", page.read_text(encoding="utf-8")))
    assert shown == made
    assert {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".svg", ".png")} == made


def test_todays_search_finds_the_texts_of_the_picture(generate):
    rows = {(row["decoder"], row["prompt"]): row for row in generate.record()["demo.svg"]["rows"]}
    for today in generate.demo_plans(("greedy", "Q*"), prompts=1):
        shown = rows[today["decoder"], today["prompt"]]
        # Another CPU's float32 may turn a close choice; another default or another Q moves J by more than this.
        assert today["objective"] == pytest.approx(shown["objective"], abs=0.05), REMEDY


def test_pictures_fetch_nothing_and_show_no_seconds():
    for path in (ROOT / "docs").glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"(?:href|src|url\()\W*https?:", text), path.name
        assert "@font-face" not in text, path.name
        assert "seconds" not in text, path.name


def test_the_glossary_has_every_word():
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
    text = "\n".join(explained)
    missing = [w for w in WORDS.split("|") if not re.search(rf"(?<!\w){re.escape(w.strip())}(?!\w)", text)]
    assert not missing, missing
    rows = [row for row in explained if row != "word"]
    assert len(rows) == len(set(rows)), "a word is explained twice"


def test_every_reward_is_in_the_table_of_rewards():
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    assert [name for name in reward_names() if not re.search(rf"`{name}\b", table)] == []


def test_each_answer_and_each_experiment_opens_with_its_conclusion():
    for name in ("faq.md", "experiments.md", "measured.md"):
        page = (ROOT / "docs" / name).read_text(encoding="utf-8")
        for part in page.split("\n## ")[1:]:
            heading, _, body = part.partition("\n")
            assert re.match(r"\*\*[^\n]+[.]\*\*\n", body.strip()), f"{name}: {heading}"
