"""Language models by name: one table of loaders, for known names, hub ids and local folders."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, UnknownNameError
from .api.language_model import load_openai_compatible
from .base import LanguageModel
from .embedded_model import EMBEDDED_MODELS
from .llama_cpp.language_model import load_llama_cpp
from .tabular import TOY, load_toy
from .transformers_lm import load_transformers

__all__ = ["language_model_names", "load_language_model", "register_language_model"]

# Called with the name, the device, the dtype and whatever other options the user gave.
Loader = Callable[..., LanguageModel]

# By name, or by a pattern of names as of file names. A full name comes before the patterns, and these in their order.
_LOADERS: dict[str, Loader] = {
    TOY: load_toy,
    **dict.fromkeys(EMBEDDED_MODELS, load_transformers),
    **dict.fromkeys(("http://*", "https://*"), load_openai_compatible),
    "*.gguf": load_llama_cpp,
    "*": load_transformers,  # local folders and hub ids
}


# By the name that ``load_language_model(…, engine=…)`` takes.
_ENGINES: dict[str, Loader] = {"torch": load_transformers, "llama.cpp": load_llama_cpp}


def language_model_names() -> list[str]:
    """Return the names of the table, patterns left out."""
    return [name for name in _LOADERS if "*" not in name]


def register_language_model(name: str) -> Callable[[Loader], Loader]:
    """Return a decorator that makes a language model known by name.

    ::

        @register_language_model("mine")
        def load_mine(name: str, device: str, dtype: str) -> LanguageModel:
            return MyLanguageModel()

    Args:
        name: The name, or a pattern with ``*`` such as ``"*.gguf"``.

    Returns:
        A decorator for a function of name, device, dtype and further keyword options. It returns what it is given.
        Whether the function loads anew at each call is its own business.

    Raises:
        ConfigurationError: The name is empty or taken.
    """
    if not name:
        raise ConfigurationError(f"the name of a language model is a non-empty string, got {name!r}")
    if name in _LOADERS:
        raise ConfigurationError(f"the language model {name!r} is registered already; choose another name")

    def register(loader: Loader) -> Loader:
        rest = _LOADERS.pop("*")  # which stays the last
        _LOADERS.update({name: loader, "*": rest})
        return loader

    return register


def load_language_model(
    name: str = "smollm2-135m-instruct",
    device: str = "auto",
    dtype: str = "auto",
    *,
    engine: str = "auto",
    **options: Any,
) -> LanguageModel:
    """Load a language model, once per process however often it is asked for with the same arguments.

    Args:
        name: ``"smollm2-135m-instruct"`` (the embedded default), ``"toy"``, a registered name, a local folder, a
            hub id, the path of a ``.gguf`` file, which llama.cpp runs, or the address of an API such as
            ``"http://127.0.0.1:8080/v1"``.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
        dtype: ``"auto"`` (bfloat16 where the hardware computes it natively, else float32), ``"float32"``, …
        engine: ``"torch"``, or ``"llama.cpp"`` for the GGUF file of a known name or a path; ``"auto"``: by the name.
        options: Further options of the loader. For llama.cpp: ``n_gpu_layers``, ``threads`` and ``flash_attention``
            (see :class:`LlamaCppLM`). For models of transformers: ``prepack`` and ``hidden_layers`` (see
            :class:`TransformersLM`), ``weights`` (``"model"``, ``"flat"``, ``"float16"``; see
            ``load_transformers``), and what ``AutoModelForCausalLM.from_pretrained`` takes (``revision``,
            ``device_map``, ``quantization_config``, …). For an address: those of :class:`OpenAICompatibleLM`.

    Returns:
        The model, shared by everybody in this process who asked with the same arguments.

    Raises:
        UnknownNameError: The name is neither known, nor a folder, nor a file, nor a model that the hub (or its cache)
            has; or there is no such engine.
        ConfigurationError: The device does not exist, the dtype is not one, the loader has no such option, or the
            engine is not installed or does not run this model.
        CacheError: The cache folder cannot be written.
    """
    if engine not in ("auto", *_ENGINES):
        raise UnknownNameError("engine", engine, ["auto", *_ENGINES])
    if not name:
        raise ConfigurationError("a model name is empty; give a known name, a hub id or a local folder")
    known = language_model_names()
    pattern = name if name in _LOADERS else next(p for p in _LOADERS if "*" in p and fnmatchcase(name, p))
    is_typo = pattern == "*" and "/" not in name and difflib.get_close_matches(name.lower(), known, cutoff=0.8)
    if is_typo and not Path(name).exists():
        # Told at once: without a network, asking the hub takes a minute.
        raise UnknownNameError("model", name, known, "A local folder or a hub id works too.")
    loader = _LOADERS[pattern]
    if engine != "auto" and loader not in (load_transformers, _ENGINES[engine]):
        raise ConfigurationError(f"the model {name!r} does not run on engine={engine!r}; leave engine out")
    try:
        return (loader if engine == "auto" else _ENGINES[engine])(name, device, dtype, **options)
    except UnknownNameError as error:
        raise UnknownNameError("model", name, known, error.hint) from error.__cause__
