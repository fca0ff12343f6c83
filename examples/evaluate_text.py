"""Bound the likelihood of a text file under a model, with error bars.

python examples/evaluate_text.py MODEL FILE
"""

import sys

import sedd_scale

model = sedd_scale.load_pretrained(sys.argv[1])
result = sedd_scale.evaluate(model, data=sys.argv[2], max_blocks=32, draws=8, seed=0)

low, high = result.ci95
print(f"{result.nats_per_token:.4f} ± {result.stderr:.4f} nats/token ({low:.4f} .. {high:.4f})")
print(f"perplexity {result.perplexity:.2f} of {result.tokens} tokens in {result.blocks} blocks")
print("terms:", {name: round(nats, 4) for name, nats in result.terms.items() if nats is not None})
