"""What a search saw can be looked at: as JSON, DOT, a graph, and a page that works in a browser without a network."""

import json

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
def open_page(chromium, tmp_path):
    """Open a tree's page with no network; it asks for nothing but itself, and nothing goes wrong."""
    address, requests, problems = (tmp_path / "tree.html").as_uri(), [], []

    def open_page(tree, **options):
        tree.to_html(tmp_path / "tree.html", facts={"decoder": NASTY})
        page = chromium.new_context(offline=True, **options).new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(address)
        return page

    yield open_page
    for context in chromium.contexts:
        context.close()
    assert requests == [address]
    assert not problems


def test_the_page_works_in_a_browser(plan, open_page):
    page = open_page(plan.tree)
    assert page.locator("#tree .best").count() == len(plan.tree.best)  # the best path is open
    assert page.locator("#details dd").first.text_content() == "the " + plan.text
    assert page.text_content("#facts dd") == NASTY
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


def test_the_page_with_the_arrow_keys(plan, open_page):
    page = open_page(plan.tree, viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.click("#close-all")
    top = page.locator("#tree > li").count()
    page.locator("#tree .edge").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tree li").count() > top
    page.keyboard.press("ArrowDown")
    focus = page.locator("#tree .edge:focus")
    assert focus.evaluate("e => e.closest('ul').id") == ""  # in the branch that was opened
    page.keyboard.press("ArrowLeft")  # back to its head
    page.keyboard.press("ArrowLeft")
    assert page.locator("#tree li").count() == top
    page.keyboard.press("ArrowDown")
    assert focus.evaluate("e => [...document.querySelectorAll('.edge')].indexOf(e)") == 1


def test_a_large_tree_is_small_and_quick(open_page, tmp_path):
    """As large as any search of the explorer; the click, hover and search of a person take no noticeable time."""
    words = [f" word{i}" for i in range(200)] + [""]
    model = TabularLM.random(201, 1, seed=0, vocabulary=words)
    mdp = DecodingMDP(model, reward="length", top_k=8, max_new_tokens=24)
    tree = AStarPlanner(mdp).plan(" word1", 2000).tree
    page = open_page(tree)
    assert len(tree) > 10_000
    assert (tmp_path / "tree.html").stat().st_size < 2_000_000
    quick = """async act => { const start = performance.now(); act();
        await new Promise(done => requestAnimationFrame(() => setTimeout(done))); return performance.now() - start; }"""
    find = "const box = document.getElementById('find'); box.value = 'word7'; box.dispatchEvent(new Event('input'))"
    actions = {
        "click": "document.querySelector('#tree button.edge').click()",
        "hover": "document.querySelector('#tree .edge').dispatchEvent(new MouseEvent('mouseenter'))",
        "search": find,
    }
    took = {name: page.evaluate(f"({quick})(() => {{ {act} }})") for name, act in actions.items()}
    assert all(milliseconds < 1000 for milliseconds in took.values()), took
