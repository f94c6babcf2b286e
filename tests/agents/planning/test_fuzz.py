"""A short run of benchmarks/fuzz.py: random problems, judged by an enumerator that shares no code with the searches."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def fuzz():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("fuzz", BENCHMARKS / "fuzz.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_random_problems_show_no_fault(fuzz):
    facts, faults = Counter(), []
    for found, wrong in fuzz.run(range(600)):
        facts.update(found)
        faults += wrong
    assert faults == []
    assert facts["certified"] > 300
    assert facts["dead ends"] > 50


def test_a_wrong_bound_is_found(fuzz, monkeypatch):
    from qstar_decoding.agents.search.state import Search

    honest = Search.upper_bound.fget
    monkeypatch.setattr(Search, "upper_bound", property(lambda search: honest(search) - 0.3))
    kinds = {kind for _, wrong in fuzz.run(range(30)) for _, kind, _ in wrong}
    assert {"bound below a reachable J", "wrong certificate"} <= kinds


def test_a_broken_constraint_is_found(fuzz, monkeypatch):
    from qstar_decoding.envs.constraints import Rules

    monkeypatch.setattr(Rules, "accepts", lambda rules, text, token_ids: True)
    kinds = {kind for _, wrong in fuzz.run(range(60)) for _, kind, _ in wrong}
    assert "broken constraint" in kinds
