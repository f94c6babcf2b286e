"""The documentation's snippets run, top to bottom, as a reader would type them."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.filterwarnings("ignore:.*(upper bound|cannot be pickled)")
@pytest.mark.parametrize("page", ["rewards.md"])
def test_every_snippet_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not (DOCS / page).is_file():
        pytest.skip("the documentation is not part of the wheel")
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 7
    names = {"__name__": "docs"}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)
    assert "sentiment" in capsys.readouterr().out
