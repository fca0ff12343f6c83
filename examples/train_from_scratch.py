"""Train a small model in a plain PyTorch loop, one process, CPU or GPU, as one would in a notebook.

    python examples/train_from_scratch.py [STEPS]

The text is the documentation and sources that every Python carries. The model goes to
example-model/. 200 steps take about a minute on two CPU cores.
"""

import sys

import torch

import sedd_scale
from sedd_scale.preparation.builtin_text import builtin_python_documents
from sedd_scale.tokenizers.alphabets import BytesTokenizer

steps = 200
if len(sys.argv) > 1:
    steps = int(sys.argv[1])
length = 64

tokenizer = BytesTokenizer()
texts = [document["text"] for document in builtin_python_documents()[:200]]
train_ids = torch.from_numpy(tokenizer.encode("\n\n".join(texts[1:])))
model = sedd_scale.new_model("configs/models/tiny.yaml", tokenizer, block_length=length)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)

model.train()
for step in range(1, steps + 1):
    starts_B1 = torch.randint(len(train_ids) - length, (32, 1))
    nats = model.loss(train_ids[starts_B1 + torch.arange(length)]).mean() / length
    optimizer.zero_grad()
    nats.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: {nats:.3f} nats/token")

held_out = sedd_scale.evaluate(model, texts[0], max_blocks=16, draws=4)
print(f"held-out text: perplexity at most {held_out.perplexity:.2f} per byte")
sedd_scale.save_pretrained(model, "example-model")
