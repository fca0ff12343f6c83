"""The commands of `sedd-scale NAME`: arguments and one call each.

A module has `COMMANDS`: its subcommands by name, the one under "" where none is named.
"""

# Name -> a line for --help; each is a module here.
COMMANDS = {
    "train": "train a model, or resume its run",
    "prepare_data": "turn text into token shards, or inspect them",
    "eval_ppl": "bound the perplexity of a model on text",
    "generate": "draw samples, or fill gaps in text",
    "convert_ckpt": "convert checkpoints, look into them, compare them",
    "plan": "memory, FLOPs, time and layouts of a run before it starts",
    "benchmark": "measure the parts of a training step",
    "compare": "train and evaluate variants of a configuration alike",
    "experiment": "measure coverage, robustness and scaling",
    "plot_run": "draw the curves of runs, or serve them while they train",
    "samples": "report on samples, or show how they came about",
    "submit": "submit a run to Slurm, or see how it stands",
    "quickstart": "from text to a trained and sampled model in minutes",
    "doctor": "say what is installed and whether training works here",
    "completion": "print the completion script of a shell",
}
