"""Talk to a server with OpenAI's client: ``talk.py URL MODEL``. Fails where an answer is not what was asked for."""

import sys

from openai import OpenAI

url, model = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
names = [entry.id for entry in client.models.list()]
assert model in names, names
asked = {"messages": [{"role": "user", "content": "Why do cats purr?"}], "max_tokens": 24, "temperature": 0}
texts = {}
for mode in ("full", "lossless", "threshold"):
    answer = client.chat.completions.create(model=model, **asked, extra_body={"exitlm": {"mode": mode, "trace": True}})
    choice, usage = answer.choices[0], answer.usage
    texts[mode] = choice.message.content
    assert usage.exitlm["mode"] == mode, usage
    assert len(choice.exitlm["exit_layers"]) == usage.completion_tokens, choice
    print(f"{mode}: {choice.message.content!r} ({usage.exitlm['mean_layers']:.1f} layers a token)")
if usage.exitlm["exact"]:
    assert texts["lossless"] == texts["full"], texts
chunks = client.chat.completions.create(model=model, **asked, stream=True, extra_body={"exitlm": {"mode": "full"}})
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert streamed == texts["full"], (streamed, texts["full"])
print("streamed, it is the same text")
