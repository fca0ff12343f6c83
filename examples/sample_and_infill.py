"""Load a model, draw samples from nothing, and fill the blanks of a text.

    python examples/sample_and_infill.py MODEL

MODEL is a run directory, an exported directory, or a published SEDD checkpoint with a tokenizer/.
"""

import sys

import sedd_scale

model = sedd_scale.load_pretrained(sys.argv[1])

for sample in sedd_scale.sample(model, 2, length=48, steps=32, sampler="analytic", seed=0):
    print(f"sample: {sample.text!r}")

# [blank:8] is eight tokens; what is given never changes.
text = "The value of [blank:8] is returned"
for filled in sedd_scale.infill(model, text, num_samples=2, steps=16, seed=0):
    print(f"infilled: {filled.text!r}")
