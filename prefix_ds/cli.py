"""The command line: what a user can ask for, and how each answer ends.

Every command imports what it needs when it runs, so that `--help` is there at once. A user's mistake ends in
one line and exit code 2, a request to stop in 75 (see `errors`). Knows nothing of how anything is done.
"""

import errno
import gc
import io
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from prefix_ds.dist import end_process, rank_of_environment, tells
from prefix_ds.errors import (
    EXIT_BUG,
    EXIT_DEVICE,
    EXIT_DONE,
    EXIT_PEER,
    EXIT_STOPPED,
    EXIT_USER,
    ConfigError,
    DeviceLost,
    PeerLost,
    PrefixError,
    Stopped,
    Teller,
    printable,
)

# Too long, or a loop of links: whichever key or argument it is in, looking for the file says so.
_NAMES_NO_FILE_CAN_HAVE = {errno.ENAMETOOLONG, errno.ELOOP}

app = typer.Typer(
    help="Prefix tuning of large language models that stay frozen and sharded.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFile = Annotated[Path, typer.Argument(help="the run's YAML file")]
Run = Annotated[Path, typer.Argument(help="a run folder")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="keys to change: section.key=value", metavar="KEY=VALUE")
]


@app.callback()
def common(local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0) -> None:
    """Prefix tuning of large language models that stay frozen and sharded."""
    # DeepSpeed's launcher passes --local_rank to every program; the environment says the same.


@app.command()
def train(run_file: RunFile, overrides: Overrides = None) -> None:
    """Train what run.yaml describes; started again, go on.

    One process, or any rank of torchrun or deepspeed. All keys: prefix-ds config.
    """
    from prefix_ds.config import read_config
    from prefix_ds.train import train as run

    run(read_config(run_file, overrides or []))


@app.command()
def generate(
    run: Run,
    overrides: Overrides = None,
    prompt: Annotated[
        str | None, typer.Option(help="one prompt: as the model reads it, or in a chat what a user says")
    ] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="records; data.prompt makes the prompts")
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="JSON lines; left out: the terminal")
    ] = None,
    without_prefix: Annotated[
        bool, typer.Option("--without-prefix", help="the bare base, to compare")
    ] = False,
) -> None:
    """Write text with a trained prefix."""
    from prefix_ds.generate import Request
    from prefix_ds.generate import generate as write

    write(run, overrides or [], Request(prompt, input_file, output_file, without_prefix))


@app.command()
def evaluate(
    run: Run,
    overrides: Overrides = None,
    split: Annotated[Literal["train", "valid", "test"], typer.Option(help="data.SPLIT is read")] = "test",
    without_prefix: Annotated[
        bool, typer.Option("--without-prefix", help="the bare base, to compare")
    ] = False,
    instruction: Annotated[
        bool, typer.Option("--instruction", help="prefix.text in front, untrained, to compare")
    ] = False,
) -> None:
    """Score a run on a split: loss, perplexity, and its outputs by evaluate.scores."""
    from prefix_ds.evaluate import Request
    from prefix_ds.evaluate import evaluate as score

    if without_prefix and instruction:
        raise ConfigError("--without-prefix and --instruction: one of them says what is in front")
    score(
        run,
        overrides or [],
        Request(split, "bare" if without_prefix else "instruction" if instruction else "trained"),
    )


@app.command()
def check(run_file: RunFile, overrides: Overrides = None) -> None:
    """Say what is wrong with a run, and show its first examples as the model will see them."""
    from rich.console import Console

    from prefix_ds.check import check_run
    from prefix_ds.config import read_config
    from prefix_ds.logs import configure_logging

    configure_logging()
    check_run(read_config(run_file, overrides or []), Console())


@app.command()
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="devices of each")] = 8,
    gpu: Annotated[str | None, typer.Option(help="kind of device; left out: h100-80gb")] = None,
    memory_gib: Annotated[float | None, typer.Option(help="of a device of your own: GiB of memory")] = None,
    tflops: Annotated[float | None, typer.Option(help="its peak in bfloat16")] = None,
    link_gbps: Annotated[
        float | None, typer.Option(help="Gbit/s of its slowest link; one device needs none")
    ] = None,
    example_tokens: Annotated[
        int | None, typer.Option(help="mean tokens of an example; left out: data.max_length")
    ] = None,
    targets: Annotated[float, typer.Option(help="part of all tokens that are targets")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="the same, for programs")] = False,
) -> None:
    """Tell memory, traffic and time of a run from its base's configuration: no weights, no GPU."""
    from rich.console import Console

    from prefix_ds.config import read_config

    config = read_config(run_file, overrides or [])
    tokens = config.data.max_length if example_tokens is None else example_tokens
    with _garbage_kept():
        from prefix_ds.plan import Job, device_named
        from prefix_ds.plan import plan as tell

        job = Job(nodes, gpus_per_node, tokens, targets)
        device = device_named(gpu, memory_gib, tflops, link_gbps, is_alone=job.num_devices == 1)
        tell(config, job, device, Console(), as_json=as_json)


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="where run.yaml is written")] = Path()) -> None:
    """Write a commented run.yaml to start from."""
    from prefix_ds.init import write_starter

    run_file = write_starter(folder)
    typer.echo(f"wrote {run_file}; edit its first keys, then: prefix-ds check {shlex.quote(str(run_file))}")


@app.command()
def config() -> None:
    """Show every key of run.yaml with its type, default and meaning."""
    from prefix_ds.config.listing import print_keys

    print_keys()


@app.command()
def export(
    words: Annotated[
        list[str],
        typer.Argument(
            help="a run folder and the folder to write; with --mlflow: keys to change instead of OUT",
            metavar="RUN OUT|KEY=VALUE",
        ),
    ],
    merge: Annotated[
        bool, typer.Option("--merge", help="several runs of one base: their prefixes side by side")
    ] = False,
    mlflow: Annotated[
        str | None, typer.Option("--mlflow", metavar="NAME", help="register as this model instead; no OUT")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow's server; left out: mlflow.uri of the run")] = None,
) -> None:
    """Write a run's prefix as a PEFT adapter with a card, or register it as an MLflow model."""
    from prefix_ds.exporting import export_runs, export_to_mlflow

    run, *overrides = words
    if mlflow is None and uri is not None:
        raise ConfigError("export: --uri goes with --mlflow NAME")
    if mlflow is None and "=" in words[-1] and not Path(words[-1]).exists():
        key, _, _ = words[-1].partition("=")
        raise ConfigError(f"export: {key}=...: keys to change go with --mlflow NAME; else OUT is named last")
    if mlflow is None:
        export_runs([Path(word) for word in words], merge=merge)
    elif all("=" in word for word in overrides) and not merge:
        typer.echo(export_to_mlflow(Path(run), mlflow, uri, overrides))
    else:
        raise ConfigError("export --mlflow NAME: takes one run folder and KEY=VALUE, and nothing else")


@app.command("import")
def import_(
    adapter: Annotated[Path, typer.Argument(help="a PEFT prefix-tuning folder")],
    out: Annotated[Path, typer.Argument(help="run folder to write")],
    overrides: Overrides = None,
) -> None:
    """Turn a PEFT prefix-tuning adapter into a run folder of ours.

    One process, or any rank of torchrun, for a base that one device cannot hold.
    """
    from prefix_ds.importing import import_run

    import_run(adapter, out, overrides or [])


@app.command()
def sync(
    run: Run,
    uri: Annotated[
        str | None,
        typer.Option(help="MLflow's server, maybe with its password; left out: the run's own"),
    ] = None,
) -> None:
    """Send to MLflow what it has not got of a run."""
    from prefix_ds.tracking import sync_run

    typer.echo(f"{sync_run(run, uri)} records sent")


@app.command()
def compare(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="run folders, or folders of them", metavar="RUN")
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="instead of folders: an experiment of MLflow; left out: prefix-ds")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow's server; left out: sqlite:///mlflow.db")] = None,
    by: Annotated[str | None, typer.Option(help="what runs are judged by; left out: validation loss")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page that needs no network")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the same, for programs")] = False,
    log: Annotated[
        bool, typer.Option("--log", help="keep the page in MLflow, and nest runs by seed")
    ] = False,
) -> None:
    """Put runs side by side: what differs, losses and scores, what each took, which is best."""
    from prefix_ds.compare import Request
    from prefix_ds.compare import compare as show

    with _garbage_kept():
        show(Request(runs or (), experiment, uri, by, html, as_json, log))


@app.command()
def links() -> None:
    """Measure how fast the ranks of a job reach each other (prefix-launch doctor runs it)."""
    from prefix_ds.links import links as measure

    measure()


@app.command()
def demo(folder: Annotated[Path, typer.Argument(help="where its runs go")] = Path("runs/demo")) -> None:
    """The whole story on a laptop's CPU, offline, in about three minutes."""
    from prefix_ds.demo import demo as tell

    tell(folder)


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Importing torch or MLflow makes so many objects that searching them costs a short command a quarter."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor on the way out
        gc.enable()


def main() -> None:
    """Runs a command and ends the process with the exit code that says how it went."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know fewer letters than we write
    end_process(_exit_code())


def _exit_code() -> int:
    try:
        app()
    except SystemExit as ended:  # by the command line itself, or a library with something to say
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or EXIT_DONE
        print(ended.code, file=sys.stderr)  # noqa: T201
        return EXIT_BUG
    except PrefixError as error:
        _say(f"error: {error}", error.teller)
        return EXIT_USER
    except Stopped as stopped:
        _say(str(stopped), "first rank")
        return EXIT_STOPPED
    except PeerLost as lost:
        _say(f"rank {rank_of_environment()}: {lost}")
        return EXIT_PEER
    except DeviceLost as lost:
        _say(str(lost))
        return EXIT_DEVICE
    except Exception as error:
        if not isinstance(error, OSError) or error.errno not in _NAMES_NO_FILE_CAN_HAVE:
            traceback.print_exc()
            return EXIT_BUG
        _say(f"error: {printable(str(error.filename))}: {error.strerror}", "machine")
        return EXIT_USER
    return EXIT_DONE


def _say(line: str, teller: Teller = "rank") -> None:
    if tells(teller):
        print(line, file=sys.stderr)  # noqa: T201
