"""The public surface: names and module paths of 0.1 still import, and renamed ones say so."""

import importlib
import subprocess
import sys

import numpy as np
import pytest

from qstar_decoding import deprecated

# What the documentation of 0.1 imported, by module.
PUBLIC = {
    "qstar_decoding.agents": """
        ARGSDecoder AStarPlanner BeamSearch BlockwiseDecoder BoundHeuristic Budget CONTENDERS Calibration
        CombinedHeuristic DECODERS Decoder Diagnostics DiverseBeamSearch GreedyDecoder Heuristic ILQLDecoder InProcess
        Job LevinTreeSearch LookAheadHeuristic MCTS MajorityVote MaskableDQN MaskableQRDQN MaskedReplayBuffer
        OracleHeuristic Outcomes Plan QFunction QHeuristic QStar RayWorkers RebaseSearch SEARCHES SamplingDecoder Search
        Searcher SoftValueHeuristic Stream TokenQNetwork TokenQPolicy TokenQuantilePolicy Usage ValueHeuristic
        ZeroHeuristic calibration evaluate make_decoder maximum mean paired_bootstrap pretrained_names
    """,
    "qstar_decoding.envs": """
        BannedStrings Completion Constraint DecodingMDP Finish ForcedStrings JSONConstraint LanguageModel MinTokens
        Observer PrefixEngine Prompt RegexConstraint TabularLM TokenDecodingEnv TokenDecodingVecEnv
        TokenDecodingVectorEnv TokenTree TransformersLM TreeEngine load_language_model load_prompts
    """,
    "qstar_decoding.rewards": """
        FunctionReward OnError Reward RewardSpec WeightedSum as_reward clip make_reward minimum normalise parse_spec
        register_reward reward_names
    """,
    "qstar_decoding.tasks": "PromptSet Task load_task task_names",
    "qstar_decoding.errors": """
        CacheError CheckpointError ConfigurationError EpisodeError HeuristicError IllegalActionError PromptError
        QStarError RewardError TrainingDivergedError UnknownNameError WorkerError
    """,
    "qstar_decoding.agents.planning": "Decoder Stream",
    "qstar_decoding.agents.search": "Budget Edges Scope Score Search Status TracePoint Usage",
    "qstar_decoding.agents.distributed": "InProcess Job RayWorkers Workers check_address",
    "qstar_decoding.agents.heuristics": "BoundHeuristic Heuristic ZeroHeuristic",
    "qstar_decoding.agents.evaluation": "Outcomes evaluate paired_bootstrap",
    "qstar_decoding.agents.interop": "as_custom_generate harness_model",
    "qstar_decoding.envs.constraints": "Constraint Rule Rules",
    "qstar_decoding.envs.prompts": "Prompt as_prompt load_prompts",
    "qstar_decoding.envs.token_decoding": "TokenDecodingEnv",
    "qstar_decoding.envs.vector": "TokenDecodingVecEnv TokenDecodingVectorEnv",
    "qstar_decoding.rewards.adapters": "from_reasoning_gym from_trl from_verifiers",
    "qstar_decoding.rewards.pool": "PooledReward",
    "qstar_decoding.rewards.testing": "check_reward",
    "qstar_decoding.cli": "main",
    "qstar_decoding.explorer.server": "create_app serve",
}
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names.split()]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{m.removeprefix('qstar_decoding.')}.{n}" for m, n in NAMES])
def test_a_name_of_0_1_imports(module, name):
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", sorted(deprecated.MOVED))
def test_a_moved_module_imports_with_a_warning(path):
    sys.modules.pop(f"qstar_decoding.{path}", None)
    with pytest.warns(DeprecationWarning, match=f"qstar_decoding.{path} has moved to"):
        old = importlib.import_module(f"qstar_decoding.{path}")
    for home in deprecated.MOVED[path]:
        new = importlib.import_module(f"qstar_decoding.{home}")
        for name in new.__all__:
            assert getattr(old, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = old.no_such_name


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [(module, name, home) for module, names in deprecated.MOVED_NAMES.items() for name, home in names.items()],
)
def test_a_name_that_has_moved_imports_with_a_warning(module, name, home):
    old = importlib.import_module(f"qstar_decoding.{module}")
    with pytest.warns(DeprecationWarning, match=f"qstar_decoding.{module}.{name} has moved to qstar_decoding.{home}"):
        found = getattr(old, name)
    assert found is getattr(importlib.import_module(f"qstar_decoding.{home}"), name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = old.no_such_name


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("qstar_decoding.agents.never")


def test_a_strategy_under_its_old_name_still_works():
    from qstar_decoding.agents import Decoder, GreedyDecoder
    from qstar_decoding.agents.search import Edges
    from qstar_decoding.envs import DecodingMDP, TabularLM

    with pytest.warns(DeprecationWarning, match="Old.search is called select"):

        class Old(Decoder):
            def search(self, search):
                row = 0
                while row >= 0:
                    edge = Edges(np.array([row]), np.array([search.f[row].argmax()]))
                    yield edge
                    row = int(search.child[edge][0])

    mdp = DecodingMDP(
        TabularLM.random(4, 1, seed=0), top_k=4, reward=lambda prompts, completions, **_: [0.0] * len(completions)
    )
    assert Old(mdp).plan("a").text == GreedyDecoder(mdp).plan("a").text


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, qstar_decoding; print({'torch', 'transformers', 'stable_baselines3'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
