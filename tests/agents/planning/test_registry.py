"""The table of decoders: one row makes a decoder known to commands, comparisons, help texts and documents."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qstar_decoding.agents as agents
from qstar_decoding.agents.evaluation import comparison as comparison_module
from qstar_decoding.agents.planning import registry
from qstar_decoding.agents.planning.registry import CONTENDERS, DECODERS, DecoderSpec, by_command, decoder_options
from qstar_decoding.cli import app as cli
from qstar_decoding.errors import UnknownNameError

ROOT = Path(__file__).parents[3]


def test_the_names_of_the_command_line_come_from_the_table():
    assert {spec.command: spec.kind for spec in CONTENDERS.values() if spec.command} == DECODERS
    assert list(DECODERS) == sorted(DECODERS)
    # Names of version 0.1, with what a seed changes and what uses Q.
    assert set(DECODERS) >= {
        *("args", "astar", "beam", "blockwise", "diverse-beam", "greedy", "ilql", "levin", "majority", "mcts"),
        *("rebase", "sample"),
    }
    assert {name for name in DECODERS if by_command(name).random} == {
        *("adaptive-vote", "blockwise", "ilql", "majority", "rebase", "sample", "smc", "unique"),
    }
    assert {name for name in DECODERS if by_command(name).uses == "q"} == {
        *("astar", "blockwise", "ilql", "mcts", "rebase", "smc"),
    }


def test_no_two_rows_have_one_command():
    commands = [spec.command for spec in CONTENDERS.values() if spec.command]
    assert len(commands) == len(set(commands))


def test_a_task_gives_all_its_settings_to_astar_and_the_score_to_others():
    planner = {"score": "q", "taper": 2.0}
    heuristic = object()
    assert decoder_options("astar", planner, heuristic, 3) == {"heuristic": heuristic, **planner}
    assert decoder_options("blockwise", planner, heuristic, 3) == {"heuristic": heuristic, "score": "q", "seed": 3}
    assert decoder_options("sample", planner, None, 3) == {"seed": 3}
    assert decoder_options("beam", planner, None, 3) == {}
    with pytest.raises(UnknownNameError, match="unknown decoder 'asta'; known, nearest first: 'astar'"):
        decoder_options("asta", planner, None, 3)


def test_every_listing_names_every_decoder():
    run = CliRunner().invoke
    listed = json.loads(run(cli.app, ["decoders", "--json"]).stdout)["decoders"]
    assert {(row["name"], row["source"]) for row in listed} == {(n, spec.source) for n, spec in CONTENDERS.items()}
    shown = run(cli.app, ["decoders"]).stdout  # as wide as the terminal, so that long names may be wrapped
    assert all(name.split()[0] in shown for name in CONTENDERS)
    help_of_decode = run(cli.app, ["decode", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(re.search(rf"\b{name}\b", help_of_decode) for name in DECODERS)
    assert f"all of the {len(CONTENDERS)} that" in run(cli.app, ["evaluate", "--help"], env={"COLUMNS": "200"}).stdout


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_documents_count_the_decoders_right(page):
    for count in re.findall(r"\b(\d+) decoders\b", (ROOT / page).read_text(encoding="utf-8")):
        assert int(count) == len(CONTENDERS), page


@pytest.mark.parametrize("module", [registry, agents])
def test_the_old_name_of_the_specification_warns(module):
    with pytest.warns(DeprecationWarning, match="Contender is called DecoderSpec"):
        assert module.Contender is DecoderSpec


def test_old_names_are_gone_elsewhere():
    assert not hasattr(comparison_module, "Contest")
    assert comparison_module.CellRunner
