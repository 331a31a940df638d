"""Opens an export in `transformers`, which needs torch, and lets it answer a first observation.

.venv/bin/pip install torch
.venv/bin/python docs/examples/open_export.py runs/quickstart/model \
    runs/quickstart/episodes/update-000001.jsonl
"""

import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, episodes = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
with open(episodes) as file:
    messages = json.loads(next(file))["messages"]
first = [m["role"] for m in messages].index("assistant")
prompt = tokenizer.apply_chat_template(
    messages[:first],
    add_generation_prompt=True,
    enable_thinking=False,
    return_dict=True,
    return_tensors="pt",
)
said = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0]
print(tokenizer.decode(said[prompt["input_ids"].shape[1] :], skip_special_tokens=True))
