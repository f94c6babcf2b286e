"""Names of the room: functions are not hidden by modules of the same name, whatever is imported first."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import qstar_decoding.agents.evaluation as room


def test_no_name_is_a_function_and_a_module():
    modules = {module.name for module in pkgutil.iter_modules(room.__path__)}
    assert not modules & {*room.__all__}


@pytest.mark.parametrize("first", ["comparison", "diagnostics", "outcomes", "suite"])
def test_evaluate_is_the_function_whatever_came_first(first):
    code = (
        f"import qstar_decoding.agents.evaluation.{first}\n"
        "from qstar_decoding.agents.evaluation import evaluate, Outcomes, paired_bootstrap\n"
        "import inspect; assert inspect.isfunction(evaluate), evaluate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_01s_names_of_the_module_are_here():
    for name in ("Outcomes", "evaluate", "paired_bootstrap"):
        assert getattr(importlib.import_module("qstar_decoding.agents.evaluation"), name)
