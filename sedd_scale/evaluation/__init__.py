"""How well a model predicts text: the bound on its likelihood, and the text it is measured on."""

PROTOCOLS = ("low-variance", "paper", "any-order")
DATASETS = ("wikitext2", "wikitext103", "ptb", "lambada", "lm1b", "text8", "openwebtext")
DOCUMENTS = ("joined", "rows", "all-rows")
REMAINDERS = ("drop", "pad")
