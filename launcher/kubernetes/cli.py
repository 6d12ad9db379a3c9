"""`prefix-launch k8s`: from words of the command line to a plan that is printed or applied.

Every field of `KubernetesOptions` is an option, with the field's default and help.

Knows nothing of manifests.
"""

import inspect
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.kubernetes.options import KubernetesOptions


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(k8s)


def k8s(
    run_file: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="keys to change: section.key=value", metavar="[KEY=VALUE]...")
    ] = None,
    nodes: Annotated[int, typer.Option(help="pods")] = 1,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="processes of a pod with --gpus-per-node 0; left out: one")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="name of a variable that all ranks get")] = None,
    port: Annotated[int | None, typer.Option(help="of the first pod, where ranks meet")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the manifests, apply nothing")] = False,
    **cluster: Any,
) -> None:
    """Train on Kubernetes: as an Indexed Job, a JobSet or a Kubeflow TrainJob."""
    from launcher.kubernetes.backend import submit
    from launcher.kubernetes.plan import plan
    from launcher.spec import job_spec, ranks_of_node

    spec = job_spec(
        run_file,
        overrides or (),
        num_nodes=nodes,
        ranks_per_node=ranks_of_node(cluster["gpus_per_node"], ranks_per_node),
        variables=env or (),
        port=port,
    )
    job = plan(spec, _options(cluster))
    if cluster["runs_claim"] is None:
        typer.echo("no --runs-claim: the run folder and its checkpoints are lost with the pod", err=True)
    typer.echo(job.text() if dry_run else submit(job), nl=False)


def _options(cluster: dict[str, Any]) -> KubernetesOptions:
    parsers = {each.name: each.metadata["parse"] for each in fields(KubernetesOptions)}
    given = {name: parsers[name](words or ()) if parsers[name] else words for name, words in cluster.items()}
    return KubernetesOptions(**given)


def _with_options() -> Iterator[inspect.Parameter]:
    """What typer is told that `k8s` takes."""
    own = inspect.signature(k8s).parameters.values()
    yield from (each for each in own if each.kind is not each.VAR_KEYWORD)
    yield from (_parameter(each) for each in fields(KubernetesOptions))


def _parameter(option: "Field[Any]") -> inspect.Parameter:
    is_repeated = option.metadata["parse"] is not None
    kind: Any = list[str] | None if is_repeated else option.type
    default = None if is_repeated else option.default
    annotation = Annotated[kind, typer.Option(help=option.metadata["doc"])]
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


k8s.__signature__ = inspect.Signature([*_with_options()])  # type: ignore[attr-defined]
