"""Tasks and rewards as other libraries take them: our side always, the real packages where they are installed."""

import asyncio
import importlib.util
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers.utils import get_json_schema

from qstar_decoding.agents import WritingGame, trl_environment, trl_reward
from qstar_decoding.errors import ConfigurationError, UnknownNameError
from qstar_decoding.rewards import as_reward
from qstar_decoding.tasks import load_task

EXAMPLES = Path(__file__).parents[2] / "examples" / "exports"
OWN = "docs/interop.md says how it was tried: {} does not install with the versions of constraints.txt"


def example(name, package):
    """Import an example, or skip where its package is absent."""
    pytest.importorskip(package, reason=OWN.format(package))
    path = EXAMPLES / name
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------------- our side


def test_a_game_pays_what_an_answer_adds_to_the_best_score():
    game = WritingGame("toy", turns=3, reward="pangram")
    assert "answer with the continuation alone" in game.reset(index=1)
    assert game.reset(index=1).endswith(game.prompts[1].text)
    score = as_reward("pangram")
    turns = [game.step(answer) for answer in ("the quick", "a", " the quick brown fox")]
    expected = [float(score([game.prompt.text], [f" {t}"])[0]) for t in ("the quick", "a", "the quick brown fox")]
    assert [turn.score for turn in turns] == pytest.approx(expected)
    assert sum(turn.reward for turn in turns) == pytest.approx(max(expected)) == pytest.approx(game.best)
    assert turns[1].reward == 0
    assert [turn.done for turn in turns] == [False, False, True]
    assert "Try again" in turns[0].message
    assert "Try again" not in turns[2].message


def test_prompts_are_drawn_by_the_seed_and_columns_reach_the_reward():
    game = WritingGame("toy")
    assert game.reset(seed=3) == game.reset(seed=3)
    assert len({game.reset(seed=seed) for seed in range(20)}) > 1
    sums = WritingGame("arithmetic", turns=1)
    sums.reset(index=0)
    answer = str(next(iter(sums.prompt.columns.values())))
    assert sums.step(answer).score > sums._reward.lower


def test_the_reference_is_what_the_tasks_planner_finds():
    game = WritingGame("toy", turns=1)
    plan = game.reference(60)
    assert plan.prompt == game.prompt.text
    assert plan.reward == pytest.approx(float(game._reward([plan.prompt], [plan.text])[0]))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"task": "no-such"}, UnknownNameError),
        ({"turns": 0}, ConfigurationError),
        ({"reward": "no-such"}, UnknownNameError),
    ],
)
def test_wrong_arguments_are_named(arguments, error):
    with pytest.raises(error):
        WritingGame(**{"task": "toy", **arguments})


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda game: game.step(None), "an answer is a text, got NoneType"),
        (lambda game: game.step(5), "an answer is a text, got int"),
        (lambda game: game.reset(seed=-1), "seed is an integer >= 0, got -1"),
        (lambda game: game.reset(seed="x"), "seed is an integer >= 0, got 'x'"),
        (lambda game: game.task.prompts.of("validation"), "unknown split 'validation'"),
        (lambda game: WritingGame("toy", split="validation"), "unknown split 'validation'"),
    ],
)
def test_wrong_moves_are_told_in_one_line(act, reason):
    game = WritingGame("toy")
    with pytest.raises(ConfigurationError, match=reason):
        act(game)
    assert game.step("abc").score > 0  # the game goes on


def test_a_task_without_a_reward_has_the_environments():
    task = load_task("toy")
    env = {name: value for name, value in task.env.items() if name != "reward"}
    assert WritingGame(task.model_copy(update={"env": env})).step("I love it").score > 0.5


def test_any_reward_is_a_reward_function_of_trl():
    reward = trl_reward("0.5*pangram + 0.5*length")
    texts = [" the quick", " a"]
    assert reward(prompts=["a", "b"], completions=texts, trainer_state=object()) == pytest.approx(
        as_reward("0.5*pangram + 0.5*length")(["a", "b"], texts).tolist()
    )
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    asked = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    assert reward(prompts=asked, completions=messages) == reward(prompts=["a", "b"], completions=texts)
    unscored = trl_reward(as_reward(lambda prompt, text: None if "x" in text else 1.0, lower=0, upper=1), name="mine")
    assert unscored(prompts=["a", "a"], completions=["x", "y"]) == [None, 1.0]
    assert unscored.__name__ == "mine"


def test_an_environment_of_trl_has_a_tool_and_a_reward():
    make = trl_environment("toy", reward="pangram", turns=2)
    one, other = make(), make()
    assert isinstance(one.reset(index=0), str)
    other.reset(index=1)
    schema = get_json_schema(one.write)["function"]
    assert schema["name"] == "write"
    assert set(schema["parameters"]["properties"]) == {"text"}
    assert one.get_reward() == as_reward("pangram").lower
    assert "Score" in one.write(text=" the quick")
    assert one.get_reward() > other.get_reward()
    one.reset(index=0)
    assert one.get_reward() == as_reward("pangram").lower


# -------------------------------------------------------------------------------------------------- the real packages


def test_verifiers_plays_the_game(monkeypatch):
    module = example("verifiers_writing.py", "verifiers")
    tasks = list(module.WritingTaskset(module.WritingConfig(writing="toy")))
    assert tasks[0].data.prompt.endswith(WritingGame("toy", split="test").prompts[0].text)
    answers = iter(["fa", "abc"])
    told = []
    record = SimpleNamespace(rewards={}, info={})
    record.record_reward = lambda name, value, weight: record.rewards.update({name: value * weight})

    class Interaction:
        trace = record

        async def turn(self, message=None):
            told.append(message)
            return SimpleNamespace(terminated=False, last_reply=next(answers))

    @asynccontextmanager
    async def interaction(task):
        yield Interaction()

    agents = SimpleNamespace(writer=SimpleNamespace(interaction=interaction))
    environment = module.WritingEnv.__new__(module.WritingEnv)
    environment.config = module.WritingEnvConfig(reference=40)
    asyncio.run(environment.run(tasks[1], agents))
    game = WritingGame("toy", split="test")
    game.reset(index=1)
    assert record.rewards == {"best_score": pytest.approx(max(game.step(a).score for a in ("fa", "abc")))}
    assert told[0] is None
    assert "Try again" in told[1]
    assert record.info["qstar"]["reward"] >= 0


def test_openenv_serves_sessions_at_once(monkeypatch):
    pytest.importorskip("openenv", reason=OWN.format("openenv-core"))
    import uvicorn

    monkeypatch.setenv("QSTAR_TASK", "toy")
    server = example("openenv/server.py", "openenv")
    client = example("openenv/client.py", "openenv")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(server.app, port=port, log_level="critical"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    try:
        prompts = server.TASK.prompts.of("train")[:4]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda p: client.play(f"http://127.0.0.1:{port}", p, 40), prompts))
    finally:
        running.should_exit = True
        thread.join(10)
    for prompt, seen in zip(prompts, found, strict=True):
        assert seen["prompt"] == prompt
        assert seen["candidates"] == seen["logprobs"] == []  # after the end
        assert np.isfinite(seen["return"])
        assert isinstance(seen["reference"], str)
        plan = server.SearchEngine(server.MDP).submit(server.Request(prompt, 40)).result()
        assert seen["reference"] == plan.text  # the same as alone


def test_gem_makes_the_environment():
    module = example("gem_writing.py", "gem")
    env = module.gem.make("qstar:Writing-v0", task="toy", turns=2)
    message, _ = env.reset(seed=1)
    assert "Continue this text" in message
    rewards = [env.step(answer)[1:3] for answer in ("fa", "abc")]
    assert [done for _, done in rewards] == [False, True]
    assert sum(reward for reward, _ in rewards) == pytest.approx(env.unwrapped.game.best)


def test_textarena_plays_the_game():
    module = example("textarena_writing.py", "textarena")
    game = module.Writing("toy", turns=2)
    game.reset(seed=1)
    assert "Continue this text" in str(game.get_observation())
    assert [game.step(answer)[0] for answer in ("fa", "abc")] == [False, True]
    rewards, _ = game.close()
    assert rewards[0] == pytest.approx(game.game.best)


def test_trl_trains_a_tiny_model_on_the_reward(tmp_path):
    module = example("trl_grpo.py", "trl")
    from transformers import GPT2Config, GPT2LMHeadModel

    from qstar_decoding.models import load_language_model

    tokenizer = load_language_model("smollm2-135m-instruct").tokenizer
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=128,
                        eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    trainer = module.train(str(tmp_path / "tiny"), steps=1, output_dir=str(tmp_path / "out"), use_cpu=True,
                           max_completion_length=4, logging_steps=1)  # fmt: skip
    assert any(key.startswith("rewards/") for row in trainer.state.log_history for key in row)
