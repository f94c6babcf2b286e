"""The recipe of ``model.generate(…, custom_generate=FOLDER)``, from a local folder, with a second, random model."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.envs import DecodingMDP, RegexConstraint, TransformersLM

RECIPE = Path(__file__).parents[2] / "examples" / "recipe"
WORDS = ["</s>", "the", "cat", "sat", "on", "a", "mat", "dog"]


def cats(prompt, completion):
    return completion.count("cat") / 4


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """A random GPT-2 of eight words, saved with its tokenizer and loaded again."""
    folder = tmp_path_factory.mktemp("second")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=8, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder).eval(), tokenizer


@pytest.fixture
def recipe(tmp_path):
    """A copy of the folder; its requirement is the package itself, which the tests need not have installed."""
    shutil.copytree(RECIPE, tmp_path / "recipe")
    if importlib.util.find_spec("qstar_decoding") and not _is_installed():
        (tmp_path / "recipe" / "custom_generate" / "requirements.txt").unlink()
    return str(tmp_path / "recipe")


def _is_installed():
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version("qstar-decoding"))
    except PackageNotFoundError:
        return False


def test_generate_searches_with_the_recipe(second, recipe):
    model, tokenizer = second
    inputs = tokenizer(["the cat", "a dog sat"], return_tensors="pt", padding=True, padding_side="left")
    qstar = {"reward": cats, "budget": 60, "env": {"top_k": 8}}
    options = {"custom_generate": recipe, "trust_remote_code": True, "max_new_tokens": 4}
    output = model.generate(**inputs, **options, qstar=qstar)
    mdp = DecodingMDP(TransformersLM(model, tokenizer), reward=cats, top_k=8, max_new_tokens=4)
    for row, prompt in zip(output, ["the cat", "a dog sat"], strict=True):
        plan = AStarPlanner(mdp).plan(prompt, 60)
        written = row[inputs["input_ids"].shape[1] :].tolist()
        assert written[: len(plan.token_ids)] == list(plan.token_ids)
        assert "cat" in plan.text
    greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert greedy.tolist() != output.tolist()


def test_other_decoders_and_settings_are_taken(second, recipe):
    model, tokenizer = second
    inputs = tokenizer(["the cat"], return_tensors="pt")
    qstar = {
        "reward": cats,
        "decoder": "beam",
        "planner": {"width": 2},
        "env": {"top_k": 8, "max_new_tokens": 3, "constraint": RegexConstraint(" ?(dog|mat) .*")},
    }
    output = model.generate(**inputs, custom_generate=recipe, trust_remote_code=True, tokenizer=tokenizer, qstar=qstar)
    assert re.match(" ?(dog|mat)", tokenizer.decode(output[0, 2:]))


@pytest.mark.parametrize("qstar", [None, {}, {"reward": cats, "width": 3}])
def test_wrong_settings_are_named(second, recipe, qstar):
    model, tokenizer = second
    with pytest.raises(ValueError, match="qstar is a dict with 'reward' and any of"):
        model.generate(
            **tokenizer(["the cat"], return_tensors="pt"), custom_generate=recipe, trust_remote_code=True, qstar=qstar
        )


def test_the_code_runs_only_where_it_is_trusted(second, recipe):
    model, tokenizer = second
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(
            **tokenizer(["the cat"], return_tensors="pt"),
            custom_generate=recipe,
            trust_remote_code=False,
            qstar={"reward": cats},
        )
