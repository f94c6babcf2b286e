"""README: short, in its order, and nothing in it that is not the files' or a run's own."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORD = json.loads((ROOT / "docs" / "pictures.json").read_text(encoding="utf-8"))["demo.svg"]
SECTIONS = [
    "Install",
    "Quickstart",
    "Objective and bounds",
    "Results",
    "When it loses",
    "Where to go next",
    "Licence",
]


def section(name):
    return README.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_it_is_short_and_in_order():
    assert len(README.splitlines()) <= 140
    assert re.findall(r"^## (.+)$", README, re.MULTILINE) == SECTIONS


def test_it_opens_with_two_sentences_and_one_text_before_and_after():
    opening = README.split("\n## ")[0]
    assert opening.index("Q\\* = Q-learning + A\\*") < opening.index("greedy") < opening.index("\nQ* ")
    assert opening.count("```") == 2


def test_the_text_before_and_after_is_the_recorded_run():
    shown = section("Install").join([README.split("\n## ")[0], ""])
    prompt = re.search(r'continue: "(.+)"', shown)[1]
    rows = {row["decoder"]: row for row in RECORD["rows"] if row["prompt"] == prompt}
    for decoder in ("greedy", "Q*"):
        row = rows[decoder]
        text, numbers = re.search(rf"^{re.escape(decoder)} +(.+)\n +(.+)$", shown, re.MULTILINE).groups()
        assert text == row["text"].strip()
        reward, logprob, objective = map(float, re.findall(r"-?\d+\.\d+", numbers))
        assert (reward, objective) == (row["reward"], row["objective"])
        assert logprob == pytest.approx(row["logprob"], abs=0.006)
    assert RECORD["commit"] in README
    assert RECORD["date"] in README


def test_the_install_lines_are_there():
    assert "pip install ." in section("Install")
    assert {"make demo", "make test"} <= set(re.findall(r"^(make \w+)", section("Install"), re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "docs/environment.md"])
def test_examples_in_pages_are_the_files_own_text(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"<!-- (examples/\w+\.py) -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found
    for name, code in found:
        example = (ROOT / name).read_text(encoding="utf-8")
        assert code in (example, example.split('"""\n\n', 1)[1]), name


def test_the_quickstart_has_twelve_lines_at_most():
    code = re.search(r"```python\n(.*?)```", section("Quickstart"), re.DOTALL)[1]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 12


def test_the_objective_and_the_bounds_take_five_lines():
    assert sum(line.startswith("    ") for line in section("Objective and bounds").splitlines()) == 5


def test_the_results_are_those_of_the_results_page():
    measured = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    measured = measured.split("\n## sentiment\n")[1].split("\n## ")[0]
    rows = [line for line in section("Results").splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 5
    for row in rows:
        name, *values = (cell.strip().replace("**", "").replace("\\", "") for cell in row.strip("|").split("|"))
        found = re.search(rf"^\| \**{re.escape(name)}\** \|(.+)", measured, re.MULTILINE)
        assert [cell.strip(" *") for cell in found[1].split("|")][: len(values)] == values, name


def test_three_bullets_say_when_it_loses():
    assert len(re.findall(r"^- ", section("When it loses"), re.MULTILINE)) == 3


def test_links_lead_to_files_and_headings():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            name, _, anchor = target.partition("#")
            assert (ROOT / name).exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
                assert anchor in slugs, target
