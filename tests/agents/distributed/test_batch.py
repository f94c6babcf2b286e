"""Batches and their results file: one bad prompt fails one line, foreign files stay, one writer at a time."""

import json
import subprocess
import sys

import pytest

from qstar_decoding.agents import Budget, GreedyDecoder, InProcess
from qstar_decoding.agents.distributed.batch import BatchDecoder, ResultsFile, decode_many
from qstar_decoding.envs import Prompt
from qstar_decoding.errors import ConfigurationError, PromptError

SURROGATE = "the \ud83d cat"
SETTINGS = {"task": "toy", "seed": 0}


class Breaking(GreedyDecoder):
    """Fails as soon as one of the prompts contains a "!", with an error that is not the project's own."""

    error: Exception = TypeError("two\nlines")

    def plan_many(self, prompts, budget=None, **kwargs):
        if any("!" in prompt.text or "\ud83d" in prompt.text for prompt in prompts):
            raise self.error
        return super().plan_many(prompts, budget, **kwargs)


@pytest.fixture
def decoder(tabular_env):
    return Breaking(tabular_env())


def lines_of(*texts):
    return {number: Prompt(text) for number, text in enumerate(texts, start=1)}


def decode(decoder, lines, **kwargs):
    return sorted(
        decode_many(lines, InProcess(BatchDecoder(decoder, "greedy", Budget(20))), **kwargs), key=lambda r: r["line"]
    )


@pytest.mark.parametrize(
    "error",
    [TypeError("two\nlines"), UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "no"), ZeroDivisionError(), KeyError("x"),
     RuntimeError("CUDA out of memory"), RecursionError("deep"), MemoryError()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_any_error_blames_the_prompt_that_raises_it(decoder, error):
    decoder.error = error
    records = decode(decoder, lines_of("ab", "b!", "c", SURROGATE, "d", "ba"), keep_going=True)
    assert [record["line"] for record in records if "error" in record] == [2, 4]
    assert all(record["error"].startswith(type(error).__name__) for record in records if "error" in record)
    assert not any("\n" in record.get("error", "") for record in records)
    with pytest.raises(PromptError, match=rf"line \d: {type(error).__name__}"):
        decode(decoder, lines_of("ab", "b!", "c"))


def test_an_interrupt_is_no_ones_fault(decoder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder, "plan_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode(decoder, lines_of("ab", "c"), keep_going=True)


def test_a_lone_surrogate_is_written_read_and_tried_again_at_every_restart(decoder, tmp_path):
    lines, path = lines_of("ab", SURROGATE, "c"), tmp_path / "out.jsonl"
    for done_before in ([], [1, 3], [1, 3]):
        with ResultsFile(path, lines, SETTINGS) as file:
            assert sorted(file.done) == done_before
            left = {number: prompt for number, prompt in lines.items() if number not in file.done}
            for record in decode(decoder, left, keep_going=True):
                file.add(record)
        records = [json.loads(line) for line in path.read_bytes().decode("utf-8").splitlines()]
        assert [(r["line"], r["prompt"], "error" in r) for r in records] == [
            (1, "ab", False),
            (2, SURROGATE, True),
            (3, "c", False),
        ]


def record_of(number, text):
    return {"line": number, "prompt": text, "text": "é" * 5, "objective": 0.5}


def whole_file(path, lines):
    with ResultsFile(path, lines, SETTINGS) as file:
        for number, prompt in lines.items():
            file.add(record_of(number, prompt.text))
    return path.read_bytes()


def test_a_results_file_cut_anywhere_is_continued(tmp_path):
    lines, path = lines_of("ab", "é\nd", SURROGATE), tmp_path / "out.jsonl"
    content = whole_file(path, lines)
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        with ResultsFile(path, lines, SETTINGS) as file:
            # A record that only lacks its end of line is whole.
            assert len(file.done) == content[:end].count(b"\n") + content[end : end + 1].count(b"\n")
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[: len(file.done)])


FOREIGN = [
    b'{"my": "minified json without newline at the end"}',
    b"[1, 2, 3]",
    b"ten years of work",
    b"name,score\nab,1",
    b'{"line": 9, "prompt": "another"',
    b'{"line": 1, "prompt": "another", "text": ',
    b'{"line": 1, "prompt": "abc", "settings": "?"}',
    b"\x00\x01\x02",
    b"\xff\xfe",
    b" ",
    b"\n",
    b"null\n",
    b'{"line": [1], "prompt": "ab", "settings": "x"}\n',
    b'{"line": true, "prompt": "ab", "settings": "x"}\n',
    b'{"line": 1, "prompt": 2, "settings": "x"}\n',
    b'{"line": 1, "prompt": "ab", "settings": "x", "objective": NaN}\n',
    b"[" * 100_000 + b"\n",
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", FOREIGN, ids=lambda content: repr(content[:30]))
def test_a_foreign_file_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "precious"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"line \d is no result|has results of another") as error:
        ResultsFile(path, lines_of("ab"), SETTINGS)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content
    path.unlink()
    ResultsFile(path, lines_of("ab"), SETTINGS).close()  # the lock is free again


def test_a_place_that_is_no_file_or_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="is not a file"):
        ResultsFile(tmp_path, lines_of("ab"), SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigurationError, OSError)):
        ResultsFile(tmp_path / "file" / "out.jsonl", lines_of("ab"), SETTINGS)


def test_a_link_leads_to_the_file(tmp_path):
    (tmp_path / "target.jsonl").write_bytes(b"")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "target.jsonl")
    content = whole_file(tmp_path / "link.jsonl", lines_of("ab"))
    assert (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "target.jsonl").read_bytes() == content != b""


WRITER = """
import sys
from pathlib import Path
from qstar_decoding.agents.distributed.batch import ResultsFile
from qstar_decoding.envs import Prompt

lines = {1: Prompt("ab"), 2: Prompt("c")}
with ResultsFile(Path(sys.argv[1]), lines, {"task": "toy", "seed": 0}) as file:
    file.add({"line": 1, "prompt": "ab", "text": ""})
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_a_second_writer_is_refused_and_loses_nothing(tmp_path):
    path = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(ConfigurationError, match="another process is writing"):
            ResultsFile(path, lines_of("ab", "c"), SETTINGS)
        other.communicate("go\n")
    assert other.returncode == 0
    with ResultsFile(path, lines_of("ab", "c"), SETTINGS) as file:
        assert list(file.done) == [1]
        with pytest.raises(ConfigurationError, match="another process is writing"):
            ResultsFile(path, lines_of("ab", "c"), SETTINGS)
