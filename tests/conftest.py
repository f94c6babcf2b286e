"""What several test modules share: the embedded model, tiny random ones of many architectures, a tabular env."""

from __future__ import annotations

import os

# Before torch and huggingface_hub are imported. Small products on a busy machine are many times faster in one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import functools
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from transformers import PreTrainedTokenizerFast

    from qstar_decoding.envs import TokenDecodingEnv, TransformersLM

# No test depends on time, and every run of the suite tries the same examples.
settings.register_profile("qstar", deadline=None, derandomize=True)
settings.load_profile("qstar")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say whether the tests of the llama.cpp engine could run."""
    try:
        found = f"ran with llama-cpp-python {metadata.version('llama-cpp-python')}"
    except metadata.PackageNotFoundError:
        found = "did not run, since llama-cpp-python is not installed (make llama-cpp)"
    terminalreporter.write_line(f"The tests of the llama.cpp engine, where selected, {found}.")


VOCABULARY = 40  # of the tiny models
WINDOW = 4  # tokens that the tiny models with sliding windows look back


@pytest.fixture(scope="session")
def lm() -> TransformersLM:
    """The embedded language model."""
    from qstar_decoding.envs import load_language_model

    return load_language_model(dtype="float32")


def _config(architecture: str) -> Any:
    """Return a small configuration; token 0 begins and ends texts."""
    import transformers

    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    old = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **ends, "vocab_size": VOCABULARY}
    new = {**old, "intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2}
    options: dict[str, dict[str, Any]] = {
        "Llama": new,
        "Qwen3": {**new, "head_dim": 8},
        "Mistral": {**new, "sliding_window": WINDOW},
        "Gemma2": {
            **new,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,  # in every other layer
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **ends, "vocab_size": VOCABULARY},
        "Phi": {**new, "num_key_value_heads": 4},
        "GPTNeoX": {**old, "intermediate_size": 48, "max_position_embeddings": 64},
        "OPT": {**old, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
        "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **ends, "vocab_size": VOCABULARY},
        # An attention of its own (sinks); a window that only the mask knows of, too large for a short trial to notice.
        "GptOss": {**new, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "Llama4Text": {
            **new,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 1,
            "use_qk_norm": False,
            "attention_chunk_size": 16,
        },
    }
    return getattr(transformers, f"{architecture}Config")(**options[architecture])


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def new_tiny_lm() -> Callable[[str], TransformersLM]:
    """Make a tiny random model of an architecture."""

    def make(architecture: str) -> TransformersLM:
        import torch
        from transformers import AutoModelForCausalLM

        from qstar_decoding.envs import TransformersLM

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_config(architecture), dtype=torch.float32)
            for weights in model.parameters():
                # As initialised, a model hardly attends to anything, and no mistake in the attention would show.
                if weights.ndim > 1:
                    weights.data.normal_(0, 0.3)
        return TransformersLM(model, _tokenizer(), name=f"tiny-{architecture}", prepack=True)

    return make


@pytest.fixture(scope="session")
def tiny_lm(new_tiny_lm: Callable[[str], TransformersLM]) -> Callable[[str], TransformersLM]:
    """Return the tiny random model of an architecture, one and the same for all tests, which leave it as it is."""
    return functools.cache(new_tiny_lm)


@pytest.fixture(scope="session")
def tabular_env() -> Callable[..., TokenDecodingEnv]:
    """Make an env on a tiny exact language model; the arguments replace the defaults."""
    from qstar_decoding.envs import TabularLM, TokenDecodingEnv
    from qstar_decoding.rewards import as_reward

    def share_of_a(prompt: str, completion: str) -> float:
        return completion.count("a") / max(len(completion), 1)

    def make(**kwargs: Any) -> TokenDecodingEnv:
        defaults = {
            "model": TabularLM.random(5, 2, seed=0),  # letters a, b, c, d, and the end of the text
            "prompts": ["ab", "c"],
            "reward": as_reward(share_of_a, lower=0, upper=1, potential=share_of_a),
            "top_k": 3,
            "max_new_tokens": 5,
            "logprob_weight": 0.1,
        }
        return TokenDecodingEnv(**{**defaults, **kwargs})

    return make


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A headless browser that asks nothing of any network by itself; ``QSTAR_CHROMIUM`` may name another.

    Not of the session: while it runs, asyncio has a running loop in this thread.
    """
    sync_api = pytest.importorskip("playwright.sync_api")
    names = (os.environ.get("QSTAR_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    executable = next((found for name in names if name and (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip("no Chromium on this machine; QSTAR_CHROMIUM may name one")
    switches = ["background-networking", "component-update", "sync", "quic", "gpu"]
    arguments = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{switch}" for switch in switches)]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()
