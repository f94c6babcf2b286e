"""Server: language models and searches behind OpenAI's interface, which ``qstar serve`` starts; needs FastAPI."""
