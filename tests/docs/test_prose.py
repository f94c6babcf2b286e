"""Prose: one sentence a line, at most 25 words, plain openings; module docstrings begin with a noun or a verb."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# No page: CHANGELOG.md, a list, and benchmarks/EXPECTED.md, which must stay as it was before the measurements.
NAMES = ("README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")
PAGES = [*(ROOT / name for name in NAMES), *sorted(ROOT.glob("docs/**/*.md"))]
MOST_WORDS = 25
# Headings that are phrases, not questions.
EXCEPTIONS = {"Where to go next", "Where Q did lose"}

# A full stop after these ends no sentence.
ABBREVIATIONS = r"(?:e\.g|i\.e|et al|vs|cf|approx|Eq|Fig|Sec|No)"
SENTENCE_END = re.compile(r"[.!?][\"')*_`”\]]*\s+(?=[\"'(*_`“\[]*[A-Z0-9α-ω])")
OPENINGS = re.compile(r"^(Who|What|Where|How|Why|Whoever|Whatever|Wherever|Whichever|Whether)\b")
ARCHAISMS = re.compile(r"\b(lest|whoever|whosoever|whereof|thereof|wherein|heretofore)\b", re.IGNORECASE)
# Lines that begin a paragraph of their own: list items, quotes, footnotes, headings.
ITEM = re.compile(r"^\s*(?:[-*] |\d+\. |> |\[\^\w+\]: |#+ )")


def prose(text):
    """Yield the paragraphs of a Markdown text as lists of (line number, line); no code, tables, comments, formulas."""
    text = re.sub(r"<!--.*?-->", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    paragraph, fenced = [], False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            line = ""
        skipped = fenced or not line.strip() or re.match(r"\s*(\||!\[|:::|    )", line)
        if paragraph and (skipped or ITEM.match(line)):
            yield paragraph
            paragraph = []
        if not skipped:
            paragraph.append((number, line))


def plain(line):
    """Return a line as it is read: links by their text, code and quotes as one word, no marks of Markdown."""
    line = ITEM.sub("", line, count=1)
    line = re.sub(r"\[\^\w+\]", "", line)
    line = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", line)
    line = re.sub(r"`[^`]*`|\"[^\"]*\"", "code", line)
    line = line.replace("&nbsp;", " ").replace("\\*", "").replace("*", "")
    return re.sub(rf"\b{ABBREVIATIONS}\.", "abbreviation", line).strip()


def sentences(line):
    return [part for part in SENTENCE_END.split(plain(line)) if part.strip()]


def words(sentence):
    """Count what is read as a word: figures, formulas and marks are none."""
    return sum(bool(re.search(r"[A-Za-z]{2}|\b[aAI]\b", word)) for word in sentence.split())


def faults(text):
    """Return what is wrong with a Markdown text, as lines."""
    found = []
    for paragraph in prose(text):
        is_quote = paragraph[0][1].lstrip().startswith(">")
        for i, (number, line) in enumerate(paragraph):
            if is_quote:  # what a decoder wrote, as it wrote it
                continue
            parts = sentences(line)
            heading = line.startswith("#")
            if len(parts) > 1 and not heading:
                found.append(f"{number}: {len(parts)} sentences in a line: {line.strip()}")
            ends = re.search(r"[.!?:;,][\"')*_`”\]]*$", re.sub(r"\[\^\w+\]$", "", line.rstrip()))
            if i + 1 < len(paragraph) and not ends and not re.match(r"\(\[", paragraph[i + 1][1].strip()):
                found.append(f"{number}: the sentence goes on in the next line: {line.strip()}")
            for part in parts:
                if words(part) > MOST_WORDS:
                    found.append(f"{number}: {words(part)} words: {part}")
                if OPENINGS.match(part) and not part.rstrip("*_ ").endswith("?") and part not in EXCEPTIONS:
                    found.append(f"{number}: begins with a question word: {part}")
            if ARCHAISMS.search(plain(line)):
                found.append(f"{number}: archaism: {line.strip()}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_are_plain(page):
    text = page.read_text(encoding="utf-8")
    if page.name == "RESULTS.md":
        text = text.split("\n## sentiment\n")[0]  # the rest is as `qstar evaluate` wrote it
    found = faults(text)
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("One sentence. Another one.", "2 sentences"),
        ("A sentence that goes on\nin the next line.", "next line"),
        (" ".join(["word"] * 26) + ".", "26 words"),
        ("What is measured stands below.", "question word"),
        ("Lock it, lest it moves.", "archaism"),
        ("- **A point.** Its reason. And more.", "3 sentences"),
    ],
)
def test_a_planted_fault_is_found(text, fault):
    [found] = faults(text)
    assert fault in found


@pytest.mark.parametrize(
    "text",
    [
        "One sentence, by Snell et al. 2023, e.g. with `a.b` and 0.5 of it.",
        "What is measured?",
        "- an item\n- another item",
        "- **A point.**\n  Its reason.",
        "```\nA. B. C\n```\n\n| A. B | What is |\n|---|---|",
        " ".join([*["word"] * 25, "12", "+", ".5", "[.1, .2]"]) + ".",
    ],
)
def test_plain_text_has_no_fault(text):
    assert faults(text) == []


# -- docstrings of modules

ROOMS = ("agents", "cli", "envs", "explorer", "models", "rewards", "serve", "tasks")
MODULES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
NO_OPENING = re.compile(r"^(Who|What|Where|How|When|Why|Whoever|Whatever|Whether|If|That|So|Then)\b")


def first_sentence(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path} has no docstring"
    return re.split(r"(?<=[a-z)`*\"'0-9]\.) (?=[A-Z`])", " ".join(docstring.split("\n\n")[0].split()))[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_modules_docstring_begins_with_a_noun_or_a_verb(path):
    sentence = first_sentence(path)
    assert not NO_OPENING.match(sentence), sentence
    assert sentence.endswith("."), sentence
    assert words(re.sub(r"``[^`]*``", "code", sentence)) <= MOST_WORDS, sentence
