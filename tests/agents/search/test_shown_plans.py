"""Plans as people see them: one line, a table in a notebook, the tree in a frame or a browser."""

import html
import re
import sys
import types
import webbrowser
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest

from qstar_decoding.agents import AStarPlanner, GreedyDecoder, ZeroHeuristic
from qstar_decoding.envs import DecodingMDP, TabularLM
from qstar_decoding.rewards import as_reward


def plan(budget=30, **options):
    lm = TabularLM.random(4, 1, vocabulary=["<i>", "&", "b", ""])
    reward = as_reward(lambda prompt, text: text.count("b") / 6, lower=0, upper=1)
    return AStarPlanner(DecodingMDP(lm, reward=reward, top_k=4, max_new_tokens=6), **options).plan("<i>", budget)


def test_a_plan_is_one_short_line():
    line = repr(plan())
    assert line.startswith("Plan('")
    assert "\n" not in line
    assert len(line) < 250
    assert re.search(r"J \d\.\d{3} \(reward \d\.\d{3}, log-prob -\d+\.\d\d\), bounds .* used 30 LM tokens", line)
    assert "stopped budget" in line
    assert "certified best" in repr(plan(budget=None))


def test_a_notebook_shows_a_table_without_markup_of_the_texts():
    shown = plan()._repr_html_()
    assert "&lt;i&gt;" in shown
    assert "<i>" not in shown
    assert shown.count("also") == 1
    assert 2 <= shown.count("<td>J ") <= 4


def test_show_opens_a_browser_outside_of_a_notebook(monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    found = plan()
    found.show()
    path = Path(url2pathname(urlparse(opened[0]).path))
    assert path.read_text(encoding="utf-8") == found.tree.to_html(facts=facts_of(path))
    path.unlink()


def facts_of(path):
    import json

    data = re.search(r'"facts":(\{.*?\})', path.read_text(encoding="utf-8"))[1]
    return json.loads(data)


def test_show_puts_the_page_into_a_frame_of_a_notebook(monkeypatch):
    displayed = []
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: object()
    display.HTML, display.display = str, displayed.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    plan().show(height=300)
    assert "height:300px" in displayed[0]
    page = html.unescape(re.search(r'srcdoc="([^"]*)"', displayed[0])[1])
    assert page.startswith("<!doctype html>")
    assert "used" in page


def test_a_plan_of_any_decoder_is_shown():
    mdp = DecodingMDP(TabularLM.random(4, 1), reward="length", top_k=3, max_new_tokens=4)
    lm = TabularLM([[1.0, 1e-9]] * 2, vocabulary=["a", ""])
    long = DecodingMDP(lm, reward="length", top_k=1, max_new_tokens=6)
    assert "unfinished the budget paid for 2 tokens" in repr(GreedyDecoder(long).plan("a", 2))
    for options in ({}, {"score": "q", "heuristic": ZeroHeuristic()}):
        found = GreedyDecoder(mdp, **options).plan("a")
        assert repr(found)
        assert found._repr_html_()


@pytest.mark.parametrize("text", ["x" * 200])
def test_long_texts_are_cut_in_the_line(text):
    lm = TabularLM([[1.0, 1e-9]] * 2, vocabulary=[text, ""])
    mdp = DecodingMDP(lm, reward="length", top_k=2, max_new_tokens=2)
    assert len(repr(GreedyDecoder(mdp).plan(text))) < 300
