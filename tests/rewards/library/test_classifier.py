"""A sequence-classification model as a reward, on a small one made on the spot."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

from qstar_decoding.envs import DecodingMDP, TabularLM
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards.library.classifier import Classifier
from qstar_decoding.rewards.testing import check_reward

WORDS = ["[PAD]", "[UNK]", "good", "bad", "movie", "the", "was"]


def make_model(labels):
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = DistilBertConfig(
        vocab_size=len(WORDS), dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=64,
        id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    return DistilBertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    make_model(["NEGATIVE", "POSITIVE"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*cannot be pickled")
def test_it_keeps_the_laws_and_says_what_the_model_says(folder, tokenizer):
    reward = Classifier(folder, label="POSITIVE")
    check_reward(reward)
    texts = [" the movie was good", " bad", " the the the the the movie"]
    model = make_model(["NEGATIVE", "POSITIVE"])
    for text, value in zip(texts, reward([""] * 3, texts), strict=True):
        expected = model(**tokenizer([text], return_tensors="pt")).logits.softmax(-1)[0, 1].item()
        assert value == pytest.approx(expected, abs=1e-6)
    other = Classifier(folder, label=0)
    assert other([""], texts[:1])[0] == pytest.approx(1 - reward([""], texts[:1])[0], abs=1e-6)
    assert (reward.lower, reward.upper) == (0.0, 1.0)


def test_the_temperature_flattens_and_the_prompt_may_count(folder):
    sharp, flat = (Classifier(folder, label=1, temperature=t)([""], ["good"])[0] for t in (0.1, 100.0))
    assert abs(flat - 0.5) < abs(sharp - 0.5) / 100
    with_prompt = Classifier(folder, label=1, with_prompt=True)
    assert with_prompt(["bad "], ["good"])[0] != with_prompt(["the "], ["good"])[0]
    without = Classifier(folder, label=1)
    assert without(["bad "], ["good"])[0] == without(["the "], ["good"])[0]


def test_a_reward_model_has_one_output(tokenizer):
    model = make_model(["score"])
    raw, bounded = Classifier(model, tokenizer=tokenizer), Classifier(model, tokenizer=tokenizer, sigmoid=True)
    value = raw([""], ["good movie"])[0]
    assert bounded([""], ["good movie"])[0] == pytest.approx(1 / (1 + math.exp(-value)))
    assert (raw.upper, bounded.upper) == (math.inf, 1.0)


def test_it_is_a_reward_in_an_environment(folder):
    model = TabularLM.random(4, 1, vocabulary=[" good", " bad", " movie", ""])
    mdp = DecodingMDP(model, reward=Classifier(folder, label="POSITIVE"), top_k=4, max_new_tokens=3)
    assert mdp.reward.has_potential
    assert 0 <= mdp.reward([""], [" good"])[0] <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: Classifier(folder), r"label is one of \['NEGATIVE', 'POSITIVE'\] or its number, got None"),
        (lambda folder: Classifier(folder, label="GOOD"), "got 'GOOD'"),
        (lambda folder: Classifier(folder / "nowhere", label=1), "no classifier can be loaded from"),
        (lambda folder: Classifier(object()), "a loaded model with tokenizer"),
        (lambda folder: Classifier(folder, label=1, temperature=0), "temperature"),
    ],
)
def test_what_is_no_classifier_is_said(make, message, folder):
    with pytest.raises(ConfigurationError, match=message):
        make(folder)
