"""Reading token shards: which block is which sample of a run, from where, in what order."""
