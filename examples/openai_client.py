"""Ask `qstar serve` with the openai package: plain texts, searches with their certificate, streams and JSON.

Start the server in another terminal first: `qstar serve`.
"""

from openai import BadRequestError, OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
chat = [{"role": "user", "content": "Describe a hotel room in one sentence."}]

# The language model alone.
answer = client.chat.completions.create(model="smollm2-135m-instruct", messages=chat, max_tokens=24, seed=0)
print(answer.choices[0].message.content, answer.usage.completion_tokens)

# A search with the shipped Q: the text of highest J = reward + α · logprob, with bounds of what is possible.
answer = client.chat.completions.create(model="qstar-sentiment", messages=chat, extra_body={"qstar": {"budget": 100}})
found = answer.choices[0]
print(found.message.content)
print(found.qstar["objective"], found.qstar["lower_bound"], found.qstar["upper_bound"], answer.usage.search)

# Any decoder and any weighted sum of rewards, as a stream.
qstar = {"reward": "0.7 * sentiment + 0.3 * complete_sentence", "budget": 60, "gap": 0.1}
stream = client.completions.create(
    model="beam/smollm2-135m-instruct", prompt="The movie was", max_tokens=12, stream=True, extra_body={"qstar": qstar}
)
for chunk in stream:
    print(chunk.choices[0].text, end="", flush=True)
print()

# JSON that follows a schema.
schema = {"type": "object", "properties": {"stars": {"type": "integer"}, "clean": {"type": "boolean"}}}
form = {"type": "json_schema", "json_schema": {"name": "review", "schema": {**schema, "required": ["stars", "clean"]}}}
answer = client.chat.completions.create(
    model="smollm2-135m-instruct", messages=chat, max_tokens=40, seed=0, response_format=form
)
print(answer.choices[0].message.content)

# What is not supported is an error that names the field.
try:
    client.chat.completions.create(model="qstar-sentiment", messages=chat, temperature=0.7)
except BadRequestError as error:
    print(error.param, error.status_code)
