"""What a search saw can be looked at: as JSON, DOT, a graph, and a page that works in a browser without a network."""

import json
import shutil

import pytest

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.envs import DecodingMDP, TabularLM
from qstar_decoding.rewards import as_reward

NASTY = '</script><b>"bold"</b>\\'


@pytest.fixture
def plan():
    words = ["the ", "cat ", "sat ", "\n", NASTY, ""]
    reward = as_reward(lambda prompt, completion: completion.count("cat") / 5, lower=0, upper=1)
    model = TabularLM.random(6, 1, seed=0, vocabulary=words)
    mdp = DecodingMDP(model, reward=reward, top_k=5, top_p=0.99, max_new_tokens=5, logprob_weight=0.1)
    return AStarPlanner(mdp, width=2, taper=None).plan("the ", 25)


def test_the_best_path_spells_the_text(plan):
    tree = plan.tree
    assert "".join(tree.token_text[edge] for edge in tree.best) == plan.text
    assert [int(tree.token[edge]) for edge in tree.best] == list(plan.token_ids)
    assert tree.objective[tree.best[-1]] == plan.objective
    assert {"open", "expanded", "finished"} <= set(tree.status) <= {"open", "pruned", "expanded", "finished", "masked"}
    for status, bound in zip(tree.status, tree.bound, strict=True):
        assert (status != "pruned") or bound <= plan.lower_bound + 1e-9
        assert (status != "open") or bound > plan.lower_bound


def test_a_search_that_finished_nothing_has_no_best_path(plan):
    mdp = DecodingMDP(TabularLM.random(4, 1, eos_token_ids=[]), reward="pangram", top_k=4, max_new_tokens=9)
    tree = AStarPlanner(mdp, search="qstar").plan("a", 2).tree
    assert tree.best == []
    assert "[shape=plaintext" in tree.to_dot()
    assert json.loads(tree.to_json())["best"] == []


def test_json_has_every_edge_and_no_infinity(plan):
    content = json.loads(plan.tree.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(content["edges"]) == len(plan.tree)
    assert content["prompt"] == "the "
    assert content["trace"][0][2] is None  # no lower bound yet
    edge = content["edges"][plan.tree.best[0]]
    assert edge["h"] == pytest.approx(edge["f"] - edge["g"])


def test_the_graph_is_a_tree_with_all_edges_that_are_actions(plan):
    networkx = pytest.importorskip("networkx")
    graph = plan.tree.to_networkx()
    assert networkx.is_arborescence(graph)
    assert graph.number_of_edges() == sum(status != "masked" for status in plan.tree.status)
    path = [data["token_text"] for *_, data in graph.edges(data=True) if data["best"]]
    assert sorted(path) == sorted(plan.tree.token_text[edge] for edge in plan.tree.best)


def test_dot_quotes_what_must_be_quoted(plan):
    dot = plan.tree.to_dot()
    assert dot.startswith("digraph")
    assert dot.count("->") == sum(status in ("expanded", "finished") for status in plan.tree.status)
    assert '\\"bold\\"' in dot
    assert "\n\n" not in dot


def test_the_page_stands_alone(plan, tmp_path):
    page = plan.tree.to_html(tmp_path / "tree.html")
    assert (tmp_path / "tree.html").read_text(encoding="utf-8") == page
    assert page.count("</script>") == 1  # a token cannot end the script
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_the_page_works_in_a_browser(plan, browser, tmp_path):
    plan.tree.to_html(tmp_path / "tree.html")
    page, requests, errors = browser.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto((tmp_path / "tree.html").as_uri())
    assert page.locator("#tree .best").count() == len(plan.tree.best)  # the best path is open
    assert page.locator("#details dd").first.text_content() == "the " + plan.text
    page.click("#close-all")
    top = page.locator("#tree > li").count()
    assert page.locator("#tree li").count() == top == sum(status != "masked" for status in plan.tree.status[:5])
    page.locator("#tree button.edge").first.click()
    assert page.locator("#tree li").count() > top
    page.hover("#tree .edge >> nth=1")
    assert "log-prob" in page.inner_text("#details")
    page.fill("#find", "bold")
    found = sum("bold" in t and s != "masked" for t, s in zip(plan.tree.token_text, plan.tree.status, strict=True))
    assert page.inner_text("#hits") == f"{found} found"
    assert page.locator(".hit").count() == found
    assert page.locator("#tree b").count() == 0  # the token's tags stay text
    page.click("#open-all")
    assert page.locator("#tree li").count() == sum(status != "masked" for status in plan.tree.status)
    assert requests == [(tmp_path / "tree.html").as_uri()]
    assert not errors
