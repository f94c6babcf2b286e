"""The explorer in a real browser, as people use it: decode, watch, choose, compare, share; and what it refuses."""

import asyncio
import dataclasses
import html
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from qstar_decoding.agents import AStarPlanner, QHeuristic  # noqa: E402
from qstar_decoding.envs import load_prompts  # noqa: E402
from qstar_decoding.errors import ConfigurationError, QStarError  # noqa: E402
from qstar_decoding.explorer.runs import LIMITS, Beginning, Request, Run, Runs, _text  # noqa: E402
from qstar_decoding.explorer.server import create_app, serve  # noqa: E402
from qstar_decoding.tasks import load_task  # noqa: E402

TOY = {"task": "toy", "prompt": "ab", "budget": 24}
SCRIPT = "<script>alert('no')</script><img src=x onerror=alert(1)>"


# -- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address():
    """The address of a running explorer, in this process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(create_app(), log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def ask(url, body=None, kind="application/json", **headers):
    """Return status and JSON content of an answer."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": kind, **headers} if data is not None else headers
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        content = error.read()
        return error.code, json.loads(content) if content.startswith(b"{") else content.decode()


def events(address, run, **headers):
    request = urllib.request.Request(f"{address}/api/runs/{run}/events", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as stream:
        return [json.loads(line[6:]) for line in stream if line.startswith(b"data: ")]


def finished(address, asked):
    status, begun = ask(f"{address}/api/runs", asked)
    assert status == 200, begun
    return begun["run"], events(address, begun["run"])


def test_a_run_tells_what_the_planner_finds(address):
    run, told = finished(address, {**TOY, "budget": 200})
    expected = AStarPlanner(load_task("toy").mdp(), heuristic=QHeuristic("toy")).plan("ab", 200)
    done = told[-1]
    assert done["kind"] == "done"
    assert (done["text"], done["stop_reason"]) == (expected.text, expected.stop_reason)
    assert done["objective"] == pytest.approx(expected.objective)
    assert done["upper_bound"] == pytest.approx(expected.upper_bound)
    states = [event for event in told if event["kind"] == "state"]
    assert len(states) > 1
    parents = [-1] + [parent for state in states for parent, _ in state["grown"]]
    assert len(parents) == 1 + done["usage"]["lm_tokens"]  # each node is told once
    assert all(parent < node for node, parent in enumerate(parents))
    ended = [end for state in states for end in state["ended"]]
    assert len(ended) == done["usage"]["reward_calls"]
    assert ended[states[-1]["best"]][2] == pytest.approx(expected.objective)
    # A browser that lost the connection gets the rest only.
    assert events(address, run, **{"Last-Event-ID": str(len(told) - 3)}) == told[-2:]


def test_a_node_has_its_candidates(address):
    run, _ = finished(address, TOY)
    status, root = ask(f"{address}/api/runs/{run}/nodes/0")
    assert status == 200
    assert root["tokens"] == []
    expected = AStarPlanner(load_task("toy").mdp(), heuristic=QHeuristic("toy")).plan("ab", 24).tree
    assert [c["token_text"] for c in root["candidates"]] == expected.token_text[:4]
    assert [c["logprob"] for c in root["candidates"]] == pytest.approx(expected.logprob[:4].tolist())
    assert [c["bound"] for c in root["candidates"]] == pytest.approx(expected.bound[:4].tolist())
    assert sum(c["best"] for c in root["candidates"]) == 1
    assert ask(f"{address}/api/runs/{run}/nodes/10000")[0] == 404


@pytest.mark.parametrize("decoder", ["astar", "beam"])
def test_going_on_from_a_node_searches_below_it_with_the_same_objective(address, decoder):
    first, _ = finished(address, {**TOY, "decoder": decoder})
    _, root = ask(f"{address}/api/runs/{first}/nodes/0")
    other = next(c for c in root["candidates"] if c["child"] >= 0 and not c["best"])
    asked = {**TOY, "decoder": decoder, "budget": 5000, "start": {"run": first, "node": other["child"]}}
    second, more = finished(address, asked)
    assert more[-1]["text"].startswith(other["token_text"])
    assert more[-1]["upper_bound"] <= other["bound"] + 1e-6
    texts = {(c["text"], c["objective"]) for c in more[-1]["completions"]}
    assert all(text.startswith(other["token_text"]) for text, _ in texts)
    mdp = load_task("toy").mdp(constraint=Beginning([other["token"]]))
    assert more[-1]["objective"] == pytest.approx(AStarPlanner(mdp).plan("ab", 5000).objective) or decoder == "beam"
    third, _ = finished(address, {**asked, "start": {"run": second, "node": 2}})  # and on from there
    assert ask(f"{address}/api/runs/{third}/nodes/1")[1]["tokens"] == [other["token_text"]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": "x" * 1_000_000}, "1,000,000 characters; at most 8,000"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": 7}, "prompt: Input should be a valid string"),
        ({"task": "nonsense"}, "nonsense"),
        ({"task": "/etc/passwd.yaml"}, "task"),
        ({"decoder": "nonsense"}, "nonsense"),
        ({"reward": "nonsense"}, "nonsense"),
        ({"reward": "classifier('/tmp')"}, "reward"),
        ({"budget": 0}, "budget"),
        ({"budget": LIMITS["budget"] + 1}, "at most 5,000"),
        ({"max_new_tokens": 65}, "at most 64"),
        ({"logprob_weight": -1}, "logprob_weight"),
        ({"start": {"run": 999, "node": 0}}, "run 999"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_what_cannot_be_met_is_refused_with_the_reason(address, change, says):
    status, answer = ask(f"{address}/api/runs", {**TOY, **change})
    assert status == 422
    assert says in answer["message"]


def test_what_is_no_request_is_refused(address):
    assert ask(f"{address}/api/runs", b"{", "application/json")[0] == 422
    assert ask(f"{address}/api/runs", b"{}", "text/plain")[0] == 415  # what a form of another site could send
    assert ask(f"{address}/api/runs", b"x" * 4_100_000)[0] == 413
    assert ask(f"{address}/api/options", Host="elsewhere.example")[0] == 400  # a name made to point here
    for path in ("events", "nodes/0", "export"):
        assert ask(f"{address}/api/runs/999/{path}")[0] == 404
    assert ask(f"{address}/api/runs/999/stop", {})[0] == 404


def test_a_search_that_fails_says_so(address):
    _, told = finished(address, {**TOY, "reward": "exact_answer"})
    assert told[-1]["kind"] == "failed"
    assert "answer" in told[-1]["message"]


def test_old_runs_are_forgotten():
    runs = Runs()
    for _ in range(51):
        last = runs.begin(Request(**{**TOY, "budget": 1}))
    assert heard(last)[-1]["kind"] == "done"
    with pytest.raises(KeyError):
        runs[1]
    with pytest.raises(QStarError, match="run 1 has no tree"):
        runs.begin(Request(**TOY, start={"run": 1, "node": 0}))
    with pytest.raises(ConfigurationError, match="of task 'toy'"):
        runs.begin(Request(task="sentiment", start={"run": last.number, "node": 0}))


def test_a_port_in_use_is_one_clear_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen at 127.0.0.1:{port}.*--port"):
            serve(port=port)


def test_the_command_serves_until_it_is_interrupted():
    command = [sys.executable, "-m", "qstar_decoding.cli", "explore", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, line
            assert ask(f"{found[0]}/api/options")[0] == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) in (0, 130)
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def heard(run, first=0):
    """Return all events of a run, heard to the end."""

    async def listen():
        return [event async for event in run.listen(first) if event is not None]

    return asyncio.run(listen())


def held(monkeypatch):
    """Hold every search after its first step, until the event that is returned is set."""
    gate = threading.Event()
    after_each_step(monkeypatch, lambda search: gate.wait(60))
    return gate


def after_each_step(monkeypatch, action):
    """Let the searching thread do something after every step, when it looks at the text."""
    monkeypatch.setattr("qstar_decoding.explorer.runs._text", lambda search: (action(search), _text(search))[1])


def until(condition):
    """Wait for what another thread does, half a minute at most."""
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    assert condition()


def test_many_listeners_hold_no_thread_and_are_gone_when_they_leave(monkeypatch, address):
    gate = held(monkeypatch)
    kept, begin = [], Runs.begin
    monkeypatch.setattr(Runs, "begin", lambda runs, request: kept.append(begin(runs, request)) or kept[-1])
    status, begun = ask(f"{address}/api/runs", {**TOY, "budget": 5000})
    assert status == 200
    [run] = kept
    before, connections = threading.active_count(), []
    try:
        for _ in range(120):  # three times the threads that the server has for blocking work
            connection = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=60)
            connection.sendall(f"GET /api/runs/{begun['run']}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            connections.append(connection)
        until(lambda: len(run._waiting) == 120)
        assert threading.active_count() - before < 45  # those for blocking work, none for each listener
        # Everything else is answered while they listen, what needs a thread and what does not.
        with urllib.request.urlopen(address, timeout=60) as page:
            assert page.status == 200
        assert ask(f"{address}/api/options")[0] == 200
        assert ask(f"{address}/api/runs/{begun['run']}/nodes/0")[0] == 404
        assert not run.is_over
        for connection in connections:
            connection.close()
        until(lambda: not run._waiting)
        assert not run.is_over  # nobody waited for the end of the run
        assert ask(f"{address}/api/runs/{begun['run']}/stop", {})[0] == 200
        gate.set()
        assert events(address, begun["run"])[-1]["stop_reason"] == "interrupted"
    finally:
        run.stop()
        gate.set()
        for connection in connections:
            connection.close()


def test_a_listener_hears_each_event_once_wherever_it_begins():
    run = Runs().begin(Request(**{**TOY, "budget": 200}))
    everything = heard(run)
    assert everything == run.events
    assert everything[-1]["kind"] == "done"
    assert heard(run, 2) == everything[2:]
    assert heard(run, len(everything)) == heard(run, len(everything) + 9) == []


def test_silence_is_told_and_a_cancelled_listener_leaves_nothing():
    run = Run(1, Request(**TOY), load_prompts(["ab"])[0])

    async def listen():
        told = [event async for event in first_of(run.listen(patience=0.01), 3)]
        assert told == [None] * 3
        assert not run._waiting
        run.tell({"kind": "done"}, last=True)
        return [event async for event in run.listen()]

    async def first_of(events, count):
        try:
            for _ in range(count):
                yield await anext(events)
        finally:
            await events.aclose()

    assert asyncio.run(listen()) == [{"kind": "done"}]


@pytest.mark.parametrize("path", ["/api/runs", "/api/runs/{run}/stop"])
@pytest.mark.parametrize(
    ("headers", "kind", "status"),
    [
        ({"Origin": "http://evil.example"}, "application/json", 403),
        ({"Origin": "http://evil.example"}, "text/plain", 403),
        ({"Origin": "null"}, "application/json", 403),
        ({"Origin": "http://127.0.0.1:1"}, "application/json", 403),
        ({"Origin": "http://localhost.evil.example"}, "application/json", 403),
        ({"Sec-Fetch-Site": "cross-site"}, "application/json", 403),
        ({"Sec-Fetch-Site": "same-site"}, "application/json", 403),
        ({}, "text/plain", 415),
        ({}, "application/x-www-form-urlencoded", 415),
        ({}, "multipart/form-data; boundary=x", 415),
    ],
)
def test_another_site_can_neither_begin_nor_stop_a_run(address, monkeypatch, path, headers, kind, status):
    stopped = []
    run, _ = finished(address, TOY)
    monkeypatch.setattr(Run, "stop", stopped.append)
    body = json.dumps(TOY).encode()
    assert ask(address + path.format(run=run), body, kind, **headers)[0] == status
    assert not stopped
    assert ask(f"{address}/api/runs/{run + 1}/events")[0] == 404  # none was begun


def test_a_page_of_this_server_may(address):
    run, _ = finished(address, TOY)
    for headers in ({"Origin": address}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {}):
        assert ask(f"{address}/api/runs/{run}/stop", {}, **headers)[0] == 200
        assert ask(f"{address}/api/runs/{run}/stop", {}, "application/json; charset=utf-8", **headers)[0] == 200


def test_every_route_that_changes_something_is_guarded():
    app = create_app()
    changing = [route for route in app.routes if getattr(route, "methods", set()) - {"GET", "HEAD", "OPTIONS"}]
    assert len(changing) >= 2
    for route in changing:
        assert "_check_origin" in {dependency.call.__name__ for dependency in route.dependant.dependencies}


@pytest.mark.parametrize("prompt", ["__DATA__", "__TITLE__", "a __DATA__ b __TITLE__", "\\1 \\g<0> __DATA__"])
def test_a_prompt_with_a_mark_of_the_template_stays_a_prompt(prompt):
    tree = AStarPlanner(load_task("toy").mdp()).plan("ab", 5).tree
    page = dataclasses.replace(tree, prompt=prompt).to_html()
    title = re.search(r"<title>(.*?)</title>", page, re.DOTALL)[1]
    assert html.unescape(title) == prompt
    data = re.search(r"const d = (.*);\n", page)[1]
    assert json.loads(data)["prompt"] == prompt


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_page(chromium, address):
    """Open the explorer, or another address, in a browser of its own; nothing may leave this machine, or go wrong."""
    contexts, requests, problems = [], [], []

    def open_page(url=address, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(url)
        if url == address:
            page.locator("#go:enabled").wait_for()
            page.select_option("#task", "toy")
            page.fill("#prompt", "ab")
        return page

    open_page.requests = requests
    yield open_page
    for context in contexts:
        context.close()
    assert not problems
    # A blob, a data: URL or a file is no request to anybody.
    assert all(url.startswith((address + "/", "file:", "data:", "blob:")) for url in requests), requests


def search(page, decoder="astar", beside="", budget=24):
    page.select_option("#decoder", decoder)
    page.select_option("#beside", beside)
    page.fill("#budget", str(budget))
    page.click("#go")


def done(page, count=1):
    page.locator(".card a[download]").nth(count - 1).wait_for()


def test_decode(open_page):
    page = open_page()
    assert page.locator(".empty").is_visible()
    search(page, budget=200)
    done(page)
    expected = AStarPlanner(load_task("toy").mdp(), heuristic=QHeuristic("toy")).plan("ab", 200)
    assert page.text_content(".card .text") == "ab" + expected.text
    assert page.text_content(".card .new") == expected.text
    facts = dict(zip(page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents(), strict=True))
    assert facts["J"] == f"{expected.objective:.3f}"
    assert facts["gap"] == f"{expected.gap:.3f}"
    assert not page.locator(".empty").is_visible()


# Notes what a person would see of the first run, at every change of the page.
WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const card = document.querySelector(".card");
        if (!card) return;
        const [caption, bounds] = [...card.querySelectorAll("figcaption")].map(e => e.textContent);
        const drawn = card.querySelector(".link").getAttribute("d").length;
        seen.push({ state: card.querySelector(".state").textContent, caption, bounds, drawn });
    }).observe(document.getElementById("runs"), { childList: true, subtree: true });
}"""


def test_watch_the_tree_grow_and_the_bounds_close(open_page):
    page = open_page()
    page.evaluate(WATCH)
    search(page, budget=1500)
    done(page)
    seen = [s for s in page.evaluate("seen") if s["state"] == "searching" and "UB" in s["bounds"]]
    numbers = lambda key, pattern: [float(m[1]) for s in seen if (m := re.search(pattern, s[key]))]  # noqa: E731
    nodes, texts = numbers("caption", r"(\d+) nodes"), numbers("caption", r"● (\d+) texts")
    lower, upper = numbers("bounds", r"LB (-?[\d.]+)"), numbers("bounds", r"UB (-?[\d.]+)")
    assert len(set(nodes)) >= 4  # it was seen to grow, more than once
    assert nodes == sorted(nodes)
    assert texts == sorted(texts)
    assert texts[0] < texts[-1]
    assert lower == sorted(lower)
    assert upper == sorted(upper, reverse=True)
    assert upper[-1] - lower[-1] < upper[0] - lower[0]
    assert seen[-1]["drawn"] > 2 * seen[0]["drawn"]


def test_choose_a_node_and_go_on_from_it(open_page):
    page = open_page()
    search(page)
    done(page)
    page.click("text=Open the tree")
    assert page.locator("[role=treeitem]").count() > 24
    table = page.locator(".side tbody tr")
    table.first.wait_for()
    assert table.count() == 4
    assert page.locator(".side th").all_text_contents()[:4] == ["token", "log π", "Q", "U"]
    page.locator("[role=treeitem][data-item='5']").click()
    page.locator(".side b:not(:empty)").wait_for()
    text = page.text_content(".side .text b")
    page.click("text=Search on from here")
    done(page, 2)
    assert page.locator(".card").first.locator(".begun").text_content() == text
    assert page.locator(".card").first.locator(".text").text_content().startswith("ab" + text)
    # Every row's numbers are numbers, and following a candidate moves into it.
    page.locator(".side button:has-text('follow')").first.click()
    page.locator(f".side .text b:not(:text-is('{text}'))").wait_for()
    for row in table.all():
        assert len([float(cell) for cell in row.locator("td").all_text_contents()[1:4]]) == 3
    page.click("text=Close the tree")
    assert page.locator("[role=treeitem]").count() == 0


def test_compare_decoders_side_by_side(open_page):
    page = open_page(viewport={"width": 1280, "height": 900})
    search(page, beside="beam")
    done(page, 2)
    cards = page.locator(".card")
    assert [text.split("toy")[0] for text in cards.locator("h2").all_text_contents()] == ["astar", "beam"]
    one, other = (cards.nth(i).bounding_box() for i in range(2))
    assert one["y"] == other["y"]
    assert one["x"] + one["width"] < other["x"]


def test_sliders_weigh_the_rewards(open_page):
    page = open_page()
    assert page.text_content("#spec") == "r = 3 * pangram"
    assert page.locator(".term output").text_content() == "3.00"
    page.locator(".term input").fill("1.5")
    page.click("text=Add a reward")
    page.locator(".term select").nth(1).select_option("distinct")
    page.locator(".term input").nth(1).fill("-0.25")
    assert page.text_content("#spec") == "r = 1.5 * pangram - 0.25 * distinct"
    with page.expect_request("**/api/runs") as sent:
        search(page)
    assert sent.value.post_data_json["reward"] == "1.5 * pangram - 0.25 * distinct"
    done(page)
    page.click("text=The task's own")
    assert page.text_content("#spec") == "r = 3 * pangram"


def test_a_run_is_shared_as_one_file_that_works_alone(open_page, tmp_path):
    page = open_page()
    search(page)
    done(page)
    text = page.text_content(".card .text")
    with page.expect_download() as download:
        page.click("text=Save as one HTML file")
    download.value.save_as(tmp_path / "run.html")
    before = len(open_page.requests)
    alone = open_page((tmp_path / "run.html").as_uri(), offline=True)
    assert open_page.requests[before:] == [(tmp_path / "run.html").as_uri()]
    assert alone.text_content("#details dd") == text
    facts = alone.inner_text("#facts")
    assert "toy, astar" in facts
    assert "24 of 24 LM tokens" in facts
    alone.click("#open-all")
    assert alone.locator("#tree li").count() > 24


def test_a_script_stays_text(open_page, tmp_path):
    page = open_page()
    page.fill("#prompt", SCRIPT)
    search(page)
    page.locator("#problem:has-text('<script>')").wait_for()  # the toy model knows letters only; the refusal quotes it
    page.select_option("#task", "sentiment")
    page.fill("#prompt", SCRIPT)
    page.fill("#length", "4")
    search(page, budget=6)
    done(page)
    assert page.text_content(".card .prompt") == SCRIPT
    with page.expect_download() as download:
        page.click("text=Save as one HTML file")
    download.value.save_as(tmp_path / "run.html")
    alone = open_page((tmp_path / "run.html").as_uri())
    assert alone.text_content("#prompt") == SCRIPT
    for each in (page, alone):
        assert each.locator("script").count() == 1  # its own
        assert each.locator("img").count() == 0


def test_a_megabyte_is_refused_with_the_limit(open_page):
    page = open_page()
    page.locator("#prompt").evaluate("box => { box.value = 'x'.repeat(1_000_000); }")
    page.click("#go")
    page.locator("#problem:has-text('1,000,000 characters; at most 8,000')").wait_for()
    assert page.locator("#go").is_enabled()
    assert page.locator(".card").count() == 0


def test_two_browsers_at_once(open_page):
    pages = [open_page(), open_page()]
    for page, prompt in zip(pages, ("ab", "ba"), strict=True):
        page.fill("#prompt", prompt)
        search(page, budget=300)
    for page, prompt in zip(pages, ("ab", "ba"), strict=True):
        done(page)
        expected = AStarPlanner(load_task("toy").mdp(), heuristic=QHeuristic("toy")).plan(prompt, 300)
        assert page.text_content(".card .text") == prompt + expected.text
        assert page.locator(".card").count() == 1


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(open_page, how, monkeypatch):
    # The toy is searched before anybody could stop it, so each step after the first text takes half a second.
    after_each_step(monkeypatch, lambda search: time.sleep(0.5 if search.best else 0))
    page = open_page()
    search(page, budget=5000)
    page.locator(".card figcaption:has-text('nodes')").wait_for()
    if how == "button":
        page.click("button:text-is('Stop')")
    else:
        page.keyboard.press("Escape")
    done(page)
    assert page.text_content(".state") == "stopped"
    used = int(re.search(r"(\d+) of 5000", page.text_content(".card figcaption"))[1])
    assert 0 < used < 5000
    assert page.locator("button:text-is('Stop')").count() == 0


def test_with_the_keyboard_alone(open_page):
    page = open_page()
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    done(page)
    page.locator("text=Open the tree").focus()
    page.keyboard.press("Enter")
    page.locator("[role=treeitem][tabindex='0']").focus()
    chosen = page.locator("[role=treeitem][aria-selected=true]")
    page.keyboard.press("ArrowRight")
    assert chosen.get_attribute("aria-level") == "2"
    assert chosen.get_attribute("class") == "item best"  # the best text is straight ahead
    assert chosen.evaluate("e => e === document.activeElement")
    first = chosen.get_attribute("data-item")
    page.keyboard.press("ArrowDown")
    assert chosen.get_attribute("aria-level") == "2"
    assert chosen.get_attribute("data-item") != first
    page.keyboard.press("ArrowUp")
    assert chosen.get_attribute("data-item") == first
    page.keyboard.press("ArrowLeft")
    assert chosen.get_attribute("data-item") == "0"


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [320, 390, 430])
def test_the_tree_fills_a_phone(open_page, width, scheme):
    page = open_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.fill("#length", "24")
    search(page, budget=200)
    done(page)
    page.click("text=Open the tree")
    found = page.evaluate(
        """() => {
          const box = document.querySelector(".tree"), frame = box.getBoundingClientRect();
          const items = [...box.querySelectorAll(".item")].map(item => item.getBoundingClientRect());
          const inside = items.filter(i => i.right > frame.left && i.left < frame.right);
          const seen = inside.filter(i => i.bottom > frame.top && i.top < frame.bottom);
          return {
            overflow: box.scrollWidth - box.clientWidth, outside: items.length - inside.length, count: items.length,
            right: Math.max(...items.map(i => i.right)) - frame.right,
            rows: new Set(seen.map(i => Math.round(i.top / 22))).size, room: frame.height / 22,
          };
        }"""
    )
    assert found["count"] > 100
    assert found["overflow"] <= 0
    assert found["outside"] == 0
    assert found["right"] <= 1
    assert found["rows"] >= 0.9 * found["room"]  # a token in every row that is seen, no blank half
    page.locator("[role=treeitem]").nth(5).click()
    assert page.locator("[role=treeitem]").nth(5).get_attribute("aria-selected") == "true"


def test_a_wide_screen_has_the_tree_from_left_to_right(open_page):
    page = open_page(viewport={"width": 1280, "height": 900})
    search(page, budget=100)
    done(page)
    page.click("text=Open the tree")
    tops = page.evaluate("[...document.querySelectorAll('.tree .best circle')].map(c => c.getAttribute('cy'))")
    assert len(tops) > 3
    assert len(set(tops)) == 1  # the best text is one straight line


def test_what_is_typed_while_the_page_loads_stays(chromium, address):
    context = chromium.new_context()
    page = context.new_page()
    gate = []
    page.route("**/api/options", lambda route: gate.append(route))
    page.goto(address)
    for field, text in (("#prompt", "typed early"), ("#length", "7"), ("#alpha", "0.5"), ("#budget", "33")):
        page.fill(field, text)
    while not gate:
        page.wait_for_timeout(20)
    gate[0].continue_()
    page.locator("#go:enabled").wait_for()
    values = [page.input_value(field) for field in ("#prompt", "#length", "#alpha", "#budget")]
    assert values == ["typed early", "7", "0.5", "33"]
    page.select_option("#task", "toy")  # a choice that was made afterwards brings its own example along
    assert page.input_value("#prompt") != "typed early"
    context.close()


@pytest.mark.parametrize("size", [(390, 844), (1280, 900)])
def test_nothing_sticks_out(open_page, size):
    page = open_page(viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme="dark")
    search(page, beside="beam")
    done(page, 2)
    page.locator("text=Open the tree").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"


def test_a_server_that_is_gone_is_said(open_page):
    page = open_page()
    page.context.set_offline(True)
    page.click("#go")
    page.locator("#problem:has-text('does not answer')").wait_for()
