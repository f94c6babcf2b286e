"""Q-learning of stable-baselines3 and sb3-contrib with invalid actions, and its replay buffer."""
