"""The planner inside transformers' generate and the lm-evaluation-harness."""

import json

import pytest
import torch
import yaml

from qstar_decoding.agents import AStarPlanner, GreedyDecoder
from qstar_decoding.agents.interop import as_custom_generate, harness_model
from qstar_decoding.envs import DecodingMDP, TabularLM
from qstar_decoding.errors import ConfigurationError


@pytest.fixture(scope="module")
def mdp(lm):
    return DecodingMDP(lm, reward="sentiment", top_k=4, max_new_tokens=8)


def test_generate_returns_the_planners_text(lm, mdp):
    planner = AStarPlanner(mdp)
    prompts = ["The movie was", "My week in the mountains was"]
    tokenizer = lm.tokenizer
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    found = lm.model.generate(**inputs, custom_generate=as_custom_generate(planner, 40))
    width = inputs["input_ids"].shape[1]
    assert torch.equal(found[:, :width], inputs["input_ids"])
    for row, plan in zip(found, planner.plan_many(prompts, 40), strict=True):
        assert tuple(row[width : width + len(plan.token_ids)].tolist()) == tuple(plan.token_ids)
        assert tokenizer.decode(row[width:], skip_special_tokens=True) == plan.text


def test_the_ids_are_searched_as_they_are_given(lm, mdp):
    # "The" and " movie" cut into other tokens than the tokenizer would: encoding the text anew would lose that.
    ids = lm.encode("The mov") + lm.encode("ie was")
    assert ids != lm.encode("The movie was")
    found = lm.model.generate(torch.tensor([ids]), custom_generate=as_custom_generate(GreedyDecoder(mdp)))
    greedy = lm.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)
    assert found[0].tolist() == greedy[0].tolist()


def test_another_models_generate_is_refused(mdp, tiny_lm):
    other = tiny_lm("Llama").model
    with pytest.raises(ConfigurationError, match="another model's generate was called"):
        other.generate(torch.tensor([[1, 2]]), custom_generate=as_custom_generate(GreedyDecoder(mdp)))
    with pytest.raises(ConfigurationError, match="generate is of transformers' models"):
        as_custom_generate(GreedyDecoder(DecodingMDP(TabularLM.random(4, 1), reward="pangram", top_k=2)))
    for given in (mdp, GreedyDecoder, None, "astar"):
        with pytest.raises(ConfigurationError, match=r"takes a decoder, such as AStarPlanner\(env\); got"):
            as_custom_generate(given)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_new_tokens": 3}, "max_new_tokens=3 is less than the 8 that the decoder may write"),
        ({"num_return_sequences": 2, "do_sample": True}, r"decoder.plan\(prompt\).best\(n\)"),
        ({"return_dict_in_generate": True}, "token ids are what there is to return"),
    ],
)
def test_what_a_decoder_does_not_do_is_refused(lm, mdp, asked, message):
    with pytest.raises(ConfigurationError, match=message):
        lm.model.generate(torch.tensor([[1, 2]]), custom_generate=as_custom_generate(GreedyDecoder(mdp)), **asked)


def test_a_pipeline_and_a_generation_config_work_as_ever(lm, mdp):
    from transformers import GenerationConfig, pipeline

    planner = AStarPlanner(mdp)
    found = planner.plan("The movie was", 30).text
    write = pipeline("text-generation", model=lm.model, tokenizer=lm.tokenizer)
    config = GenerationConfig(max_new_tokens=8, pad_token_id=lm.model.generation_config.pad_token_id)
    for more in ({}, {"generation_config": config}, {"max_new_tokens": 20}):
        [answer] = write("The movie was", custom_generate=as_custom_generate(planner, 30), **more)
        assert answer["generated_text"] == "The movie was" + found


ITEMS = [
    {"question": "2+2=4\n3+4=7\n1+1=", "answer": "2"},
    {"question": "The capital of France is", "answer": " Paris"},
    {"question": "2+2=4\n3+4=7\n5+5=", "answer": "11"},
]


def write_task(folder, **changes):
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    task = {
        "task": "three_items",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 2},
        "metric_list": [{"metric": "exact_match"}],
        **changes,
    }
    (folder / "three_items.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.filterwarnings("ignore")
def test_the_harness_scores_a_task_of_three_items(lm, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.tasks import TaskManager

    write_task(tmp_path)
    made = []

    def make(stop, max_new_tokens):
        made.append((stop, max_new_tokens))
        return AStarPlanner(DecodingMDP(lm, reward="length", stop=stop, max_new_tokens=max_new_tokens, top_k=4))

    found = lm_eval.simple_evaluate(
        model=harness_model(make, 30), tasks=["three_items"], task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )  # fmt: skip
    assert made == [(("\n", "."), 2)]
    answers = [sample["filtered_resps"][0] for sample in found["samples"]["three_items"]]
    right = [answer == item["answer"] for answer, item in zip(answers, ITEMS, strict=True)]
    assert found["results"]["three_items"]["exact_match,none"] == pytest.approx(sum(right) / 3)
    assert right[1], answers


@pytest.mark.filterwarnings("ignore")
def test_likelihoods_are_the_language_models(lm):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    model = harness_model(lambda stop, length: GreedyDecoder(DecodingMDP(lm, reward="length", stop=stop)))
    ask = [("The capital of France is", " Paris"), ("The capital of France is", " Rome"), ("", "The")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(ask[:2])]
    (right, is_greedy), (wrong, not_greedy) = model.loglikelihood(requests)
    ids, _ = lm.encode(ask[0][0]), None
    _, logprobs = lm.forward([ids])
    assert right == pytest.approx(logprobs[0][lm.encode(" Paris")[0]], abs=1e-3)
    assert right > wrong
    assert is_greedy
    assert not not_greedy
    (rolling,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (ask[0][0],), 0)])
    assert rolling < right
