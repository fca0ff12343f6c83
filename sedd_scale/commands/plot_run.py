"""Draw the curves of one or several runs."""

import argparse
from pathlib import Path

from sedd_scale.cli import Command, given_path, make_parser
from sedd_scale.errors import ConfigError

PORT = 8765


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale plot_run",
        "Draw the loss, the validation bound with its standard error, the gradient norm, the "
        "learning rate, the throughput and the loss by noise level of runs from their "
        "metrics.jsonl: as a picture, as one HTML page, or served while they train.",
        "sedd-scale plot_run runs/first runs/second --output both.html",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=given_path, metavar="RUN", help="run directories, drawn together")
    add(
        "--output",
        type=given_path,
        metavar="FILE",
        help="a picture (.png, .svg, .pdf) or a page that needs nothing else (.html), replaced "
        "where it exists (one run: RUN/curves.png)",
    )
    add(
        "--samples",
        type=given_path,
        metavar="FILE.jsonl",
        help="samples of sedd-scale generate --trace, whose trajectories the page shows too",
    )
    add(
        "--watch",
        action="store_true",
        help="serve the page on 127.0.0.1 and refresh it while the runs train, until Ctrl-C",
    )
    add("--port", type=int, metavar="N", help=f"port of --watch; 0: any free one ({PORT})")
    return parser


def plot_command(arguments: argparse.Namespace) -> None:
    """Read the runs, draw or serve them, and print where."""
    from sedd_scale.checkpoint.directory import run_of
    from sedd_scale.tracking.plots import RunMetrics, plot_runs, read_run
    from sedd_scale.tracking.run_page import make_server, run_page

    output: Path | None = arguments.output
    if arguments.watch and output is not None:
        raise ConfigError(f"--output {output} and --watch exclude each other: leave one out")
    if arguments.port is not None and not arguments.watch:
        raise ConfigError(f"--port {arguments.port} is for --watch alone: leave it out")
    if output is None and not arguments.watch:
        if len(arguments.runs) > 1:
            raise ConfigError(f"{len(arguments.runs)} runs have no one place: give --output")
        output = run_of(arguments.runs[0]) / "curves.png"
    is_page = output is None or output.suffix == ".html"
    if arguments.samples is not None and not is_page:
        raise ConfigError("--samples is for a page: give --output FILE.html or --watch")
    traces = None
    if arguments.samples is not None:
        from sedd_scale.generation.samples_file import traced_samples
        from sedd_scale.generation.trace_page import trace_page

        traces = trace_page(traced_samples(arguments.samples))

    def read() -> list[RunMetrics]:
        return [read_run(run_of(path), name=str(path)) for path in arguments.runs]

    runs = read()
    if output is None:
        with make_server(
            PORT if arguments.port is None else arguments.port, read, traces=traces
        ) as server:
            print(f"http://127.0.0.1:{server.server_port}/", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()
        return
    if is_page:
        from sedd_scale.files.atomic import write_atomically

        if not output.parent.is_dir():
            raise ConfigError(
                f"--output {output}: directory {output.parent} does not exist; make it"
            )
        text = run_page(runs, traces=traces)
        write_atomically(output, text.encode("utf-8", errors="replace"))
    else:
        plot_runs(runs, output)
    print(output)


COMMANDS = {"": Command(build_parser, plot_command)}
