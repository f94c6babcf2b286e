"""A task as a game of textarena for one player."""

import textarena as ta

from qstar_decoding.agents import WritingGame


class Writing(ta.Env):
    """The player continues a prompt; the best score of all turns is the reward."""

    def __init__(self, task="sentiment", turns=2, **options):
        self.game = WritingGame(task, turns=turns, **options)

    def reset(self, num_players=1, seed=None):
        self.state = ta.SinglePlayerState(num_players=num_players, seed=seed, max_turns=self.game.turns)
        instruction = self.game.reset(seed=seed)
        self.state.reset(game_state={}, player_prompt_function=lambda player_id, game_state: instruction)

    def step(self, action):
        self.state.add_observation(action, ta.ObservationType.PLAYER_ACTION, from_id=self.state.current_player_id)
        turn = self.game.step(action)
        self.state.add_observation(turn.message, ta.ObservationType.GAME_MESSAGE)
        if turn.done:
            self.state.set_outcome(reward=self.game.best, reason=turn.message)
        return self.state.step()


if __name__ == "__main__":
    game = Writing()
    game.reset(seed=0)
    print(game.get_observation())
    while not game.step(" a joy from beginning to end.")[0]:
        print(game.get_observation())
    print(game.close())
