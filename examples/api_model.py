"""A model behind an API: Q* steers a server of llama.cpp, and a small local model reads along. A minute on a CPU."""

import xllamacpp

from qstar_decoding.agents import AStarPlanner, GreedyDecoder, QHeuristic
from qstar_decoding.models import load_language_model
from qstar_decoding.models.embedded_model import gguf_path
from qstar_decoding.tasks import load_task

# Any server of completions will do; this one needs no other program: the embedded model, 4 streams of 512 tokens.
parameters = xllamacpp.CommonParams()
parameters.model.path = str(gguf_path("smollm2-135m-instruct"))
parameters.n_parallel, parameters.n_ctx = 4, 4 * 512
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)

# The reader is the embedded model too, so the Q-function that was trained on it fits.
model = load_language_model(f"{server.listening_address}/v1", timeout=120)
mdp = load_task("sentiment").mdp(model=model)
prompt = "The play at the village theatre"
for name, decoder in (
    ("greedy", GreedyDecoder(mdp)),
    ("Q*", AStarPlanner(mdp, heuristic=QHeuristic("sentiment"))),
):
    plan = decoder.plan(prompt, budget=100)
    print(f"{name:<7} J {plan.objective:.2f}  {prompt}{plan.text}")
print(model.usage)
