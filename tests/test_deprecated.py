"""Methods of version 0.1 under their old names: they warn and do what the new ones do."""

import numpy as np
import pytest

from qstar_decoding.envs import DecodingMDP, TabularLM
from qstar_decoding.envs.observations import Observer


@pytest.fixture
def mdp():
    return DecodingMDP(TabularLM.random(4, 1, seed=0), reward="pangram", top_k=2, max_new_tokens=3, max_prefixes=1)


def test_fresh_is_with_empty_tree(mdp):
    mdp.tree.roots([[0]])
    with pytest.warns(DeprecationWarning, match=r"DecodingMDP.fresh is called with_empty_tree now"):
        other = mdp.fresh()
    assert (len(mdp.tree), len(other.tree)) == (1, 0)
    assert other.model is mdp.model


def test_make_room_is_evict_if_full(mdp):
    mdp.tree.roots([[0], [1], [2]])
    with pytest.warns(DeprecationWarning, match=r"DecodingMDP.make_room is called evict_if_full now"):
        mdp.make_room()
    assert len(mdp.tree) == 0


def test_check_going_on_is_check_can_continue(mdp):
    with pytest.warns(DeprecationWarning, match="check_can_continue"):
        mdp.check_going_on(mdp.tree.roots([[0]]))


def test_hold_is_pin_and_forget_is_evict(mdp):
    class Holder:
        node = mdp.tree.roots([[0], [1]])[1:]

    holder = Holder()
    with pytest.warns(DeprecationWarning, match=r"TokenTree.hold is called pin now"):
        mdp.tree.hold(holder)
    with pytest.warns(DeprecationWarning, match=r"TokenTree.forget is called evict now"):
        new = mdp.tree.forget(0)
    assert new.tolist() == [-1, 0]
    assert holder.node.tolist() == [0]


def test_after_the_end_is_terminal_observation(mdp):
    observer = Observer(mdp)
    with pytest.warns(DeprecationWarning, match=r"Observer.after_the_end is called terminal_observation now"):
        old = observer.after_the_end(2)
    new = observer.terminal_observation(2)
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[key], new[key]) for key in new)
