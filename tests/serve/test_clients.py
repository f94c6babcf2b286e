"""Real clients of OpenAI's interface, against a server that listens: openai, curl, lm-evaluation-harness, optillm."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from qstar_decoding.agents import SearchEngine
from qstar_decoding.serve.guard import Limits

from .conftest import make_engine
from .live import BODY, live

openai = pytest.importorskip("openai")

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 6, "seed": 0}
SEARCH = {"extra_body": {"qstar": {"reward": "distinct", "budget": 60}}}


@pytest.fixture(scope="module")
def server():
    with live(make_engine()) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


# -- openai ----------------------------------------------------------------------------------------------------------


def test_a_chat(client):
    answer = client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens <= 6
    again = client.chat.completions.create(**CHAT)
    assert again.choices[0].message.content == answer.choices[0].message.content  # by its seed


def test_a_search_with_its_certificate(client, server):
    answer = client.chat.completions.create(**{**CHAT, "model": "astar/tiny"}, **SEARCH)
    plan = server.engine.decoder.plan(
        {"prompt": [{"role": "user", "content": "ab"}]}, 60, reward="distinct", max_new_tokens=6
    )
    [choice] = answer.choices
    assert choice.message.content == plan.text
    assert choice.model_extra["qstar"]["objective"] == pytest.approx(plan.objective)
    assert answer.usage.model_extra["search"]["lm_tokens"] == plan.usage.lm_tokens


def test_several_texts_of_one_request(client):
    answer = client.completions.create(model="tiny", prompt=["ab", "c"], n=3, max_tokens=5, seed=1)
    assert [choice.index for choice in answer.choices] == [*range(6)]
    assert len({choice.text for choice in answer.choices}) > 1
    best = client.completions.create(model="beam/tiny", prompt="ab", n=2, max_tokens=5, **SEARCH)
    assert len({choice.text for choice in best.choices}) == 2


@pytest.mark.parametrize("model", ["tiny", "astar/tiny"])
def test_a_stream_joins_to_the_whole_answer(client, model):
    fields = {**CHAT, "model": model, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**fields).choices[0]
    chunks = [*client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})]
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.message.content
    assert chunks[-1].usage.completion_tokens >= 1
    streamed = [t.token for chunk in chunks for c in chunk.choices if c.logprobs for t in c.logprobs.content or []]
    assert streamed == [token.token for token in whole.logprobs.content]
    assert all(len(token.top_logprobs) == 2 for token in whole.logprobs.content)


def test_an_asynchronous_client_with_many_requests(server):
    async def ask(client, i):
        prompt = "abcdefg"[i % 7]
        if i % 3:
            answer = await client.completions.create(model="tiny", prompt=prompt, max_tokens=4, seed=i)
            return answer.choices[0].text
        stream = await client.completions.create(model="tiny", prompt=prompt, max_tokens=4, seed=i, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    async def together(order):
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            return dict(zip(order, await asyncio.gather(*(ask(client, i) for i in order)), strict=True))

    assert asyncio.run(together(range(30))) == asyncio.run(together([*reversed(range(30))]))


def test_models(client):
    names = [model.id for model in client.models.list()]
    assert "tiny" in names
    assert "astar/tiny" in names
    assert client.models.retrieve("astar/tiny").id == "astar/tiny"


def test_a_json_schema(lm):
    schema = {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}},
        "required": ["sunny"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    with (
        live(SearchEngine(lm, reward="length")) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client,
    ):
        for model in (lm.name, f"greedy/{lm.name}"):
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "Is it sunny? Answer as JSON."}],
                response_format=asked,
                max_tokens=16,
                temperature=0,
            )
            assert answer.choices[0].finish_reason == "stop"
            assert isinstance(json.loads(answer.choices[0].message.content)["sunny"], bool)


ERRORS = [
    ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
    ({"temperature": 9}, openai.BadRequestError, "temperature"),
    ({"messages": []}, openai.BadRequestError, "messages"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
    ({"extra_body": {"rewrd": 1}}, openai.BadRequestError, "rewrd"),
    ({"extra_body": {"qstar": {"reward": "lenght"}}, "model": "astar/tiny"}, openai.BadRequestError, "qstar.reward"),
    ({"model": "gpt-4o"}, openai.NotFoundError, "model"),
]


@pytest.mark.parametrize(("changes", "kind", "param"), ERRORS, ids=[next(iter(e[0])) for e in ERRORS])
def test_errors_are_the_clients_exceptions_and_name_the_field(client, changes, kind, param):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{**CHAT, **changes})
    assert caught.value.param == param
    assert len(str(caught.value).splitlines()) == 1


def test_keys_hosts_and_limits_are_the_clients_exceptions(server):
    limits = Limits(live=1)
    with live(make_engine(), keys=["right"], limits=limits, hosts=["127.0.0.1"]) as guarded:
        url = f"{guarded.url}/v1"
        for key, headers, kind in (
            ("wrong", {}, openai.AuthenticationError),
            ("right", {"Origin": "https://elsewhere.example"}, openai.PermissionDeniedError),
            ("right", {"Host": "elsewhere.example"}, openai.PermissionDeniedError),
        ):
            client = openai.OpenAI(base_url=url, api_key=key, default_headers=headers, max_retries=0)
            with client, pytest.raises(kind):
                client.completions.create(**BODY)
        with openai.OpenAI(base_url=url, api_key="right", max_retries=0) as client:
            assert client.completions.create(**BODY).choices
            guarded.settled()  # the answer comes before its place is free again
            long = client.completions.create(
                model="astar/tiny", prompt="a", stream=True, max_tokens=900, extra_body={"qstar": {"top_k": 8}}
            )
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**BODY)
            assert caught.value.response.headers["retry-after"]
            long.close()  # the client goes away
            assert guarded.settled() == (0, 0, 0)
            assert client.completions.create(**BODY).choices


def test_a_client_that_times_out_or_goes_away_frees_its_search(server):
    long = {"model": "astar/tiny", "prompt": "a", "max_tokens": 900, "extra_body": {"qstar": {"top_k": 8}}}
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=0.3)
    with client, pytest.raises(openai.APITimeoutError):
        client.completions.create(**long)
    assert server.settled() == (0, 0, 0)
    ticks = server.engine.ticks
    time.sleep(0.1)
    assert server.engine.ticks == ticks


# -- curl ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    def curl(*arguments, body=None):
        command = ["curl", "-sS", "--max-time", "30", "--noproxy", "*", *arguments]
        if body is not None:
            command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    answer = json.loads(curl(f"{server.url}/v1/completions", body=BODY))
    assert answer["object"] == "text_completion"
    stream = curl("-N", f"{server.url}/v1/chat/completions", body={**CHAT, "stream": True})
    assert stream.startswith("data: {")
    assert stream.rstrip().endswith("data: [DONE]")
    assert json.loads(curl(f"{server.url}/health")) == {"status": "ok"}
    assert "qstar_requests_total" in curl(f"{server.url}/metrics")
    assert curl("-o", os.devnull, "-w", "%{http_code}", f"{server.url}/v1/completions", "-d", "{}") == "415"


# -- lm-evaluation-harness -------------------------------------------------------------------------------------------

ITEMS = [
    {"question": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0},
    {"question": "2+2=4\n3+4=7\n1+1=", "choices": ["5", "2"], "answer": 1},
    {"question": "The opposite of hot is", "choices": [" cold", " green"], "answer": 0},
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 3},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("api", "path", "kind"),
    [
        ("local-completions", "/v1/completions", CHOICE),
        ("local-completions", "/v1/completions", WRITTEN),
        ("local-chat-completions", "/v1/chat/completions", WRITTEN),
    ],
    ids=["choices", "completions", "chats"],
)
def test_the_harness_runs_a_task_of_three_items(lm, tmp_path, monkeypatch, api, path, kind):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    from lm_eval.tasks import TaskManager

    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    task = {
        "task": "three_items",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        **kind,
    }
    (tmp_path / "three_items.yaml").write_text(yaml.safe_dump(task))
    lm.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with live(SearchEngine(lm, reward="length")) as server:
        arguments = {"model": lm.name, "base_url": server.url + path, "max_retries": 1, "num_concurrent": 2}
        if api == "local-completions":
            arguments |= {"tokenizer_backend": "huggingface", "tokenizer": str(tmp_path / "tokenizer")}
        found = lm_eval.simple_evaluate(
            model=api,
            model_args=arguments,
            tasks=["three_items"],
            task_manager=TaskManager(include_path=str(tmp_path)),
            apply_chat_template=api == "local-chat-completions",
            bootstrap_iters=0,
        )
    samples = sorted(found["samples"]["three_items"], key=lambda sample: sample["doc_id"])
    if kind is CHOICE:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        scorer = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=1)
        asked = [(item["question"], choice) for item in ITEMS for choice in item["choices"]]
        wanted = scorer.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)])
        got = [pair for sample in samples for pair in sample["filtered_resps"]]
        assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in wanted]
        assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], abs=1e-3)
    else:
        assert all(isinstance(sample["filtered_resps"][0], str) for sample in samples)
        assert 0 <= found["results"]["three_items"]["exact_match,none"] <= 1
        if api == "local-completions":
            assert samples[0]["filtered_resps"][0].startswith(" Paris")


# -- optillm ---------------------------------------------------------------------------------------------------------


def test_optillm_best_of_n(lm):
    """The proxy of the field: it asks the server for several texts, rates them with it, and returns the best."""
    pytest.importorskip("optillm", reason="optillm is not installed; its pins exclude this package's transformers")
    script = (
        "import sys\n"
        "from openai import OpenAI\n"
        "from optillm.bon import best_of_n_sampling\n"
        "client = OpenAI(base_url=sys.argv[1], api_key='any', max_retries=0)\n"
        "text, tokens = best_of_n_sampling(\n"
        "    'Be brief.', 'Name a river.', client, sys.argv[2], n=2, request_config={'max_tokens': 12}\n"
        ")\n"
        "print(repr((text, tokens)))\n"
    )
    with live(SearchEngine(lm, reward="length")) as server:
        done = subprocess.run(
            [sys.executable, "-c", script, f"{server.url}/v1", lm.name], capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr
    text, tokens = eval(done.stdout)
    assert isinstance(text, str)
    assert tokens > 0
