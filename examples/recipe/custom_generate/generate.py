"""``model.generate(…, custom_generate=…)`` by search, with qstar-decoding: any causal language model, any reward."""

from weakref import WeakKeyDictionary

from qstar_decoding.agents import QHeuristic, make_decoder
from qstar_decoding.agents.interop import as_custom_generate
from qstar_decoding.envs import DecodingMDP, TransformersLM

_WRAPPED = WeakKeyDictionary()  # language models by the model that they wrap; each keeps its measurements
_KEYS = {"reward", "budget", "decoder", "q", "env", "planner"}


def generate(model, qstar=None, tokenizer=None, custom_generate=None, trust_remote_code=None, **arguments):
    """Return int64 [batch, length]: the input ids, each followed by its completion and, on the right, padding.

    Args:
        model: The model whose ``generate`` was called.
        qstar: The keys of the README: ``reward`` (needed), ``budget``, ``decoder``, ``q``, ``env``, ``planner``.
        tokenizer: The model's tokenizer; by default the one that it was saved with.
        custom_generate: Of the call; not used here.
        trust_remote_code: Of the call; not used here.
        arguments: Everything else that ``generate`` was called with.
    """
    settings = dict(qstar or {})
    if "reward" not in settings or settings.keys() - _KEYS:
        raise ValueError(f"qstar is a dict with 'reward' and any of {sorted(_KEYS - {'reward'})}, got {settings!r}")
    if model not in _WRAPPED:
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        _WRAPPED[model] = TransformersLM(model, tokenizer)
    horizon = arguments.get("max_new_tokens") or getattr(arguments.get("generation_config"), "max_new_tokens", None)
    env = {"max_new_tokens": horizon or 32, **settings.get("env", {})}
    mdp = DecodingMDP(_WRAPPED[model], reward=settings["reward"], **env)
    planner = dict(settings.get("planner", {}))
    if "q" in settings:
        planner["heuristic"] = QHeuristic(settings["q"])
    decoder = make_decoder(settings.get("decoder", "astar"), mdp, **planner)
    arguments.setdefault("max_new_tokens", mdp.max_new_tokens)
    return model.generate(custom_generate=as_custom_generate(decoder, settings.get("budget", 200)), **arguments)
