"""Faster forwards on a CPU: models of the Llama family as a short list of operations, and weights laid out for it."""
