"""`prefix-ds generate`: text written with a trained prefix, for one prompt or a file of records."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefix_ds.config import RunConfig
from prefix_ds.data.prompts import Prompt, prompt_of_text, read_prompts, tell_cut
from prefix_ds.dist import check_same, first_here_first, joined_world, on_first, peers_may_die, together
from prefix_ds.errors import ConfigError, DataError, RunError
from prefix_ds.files import check_can_write, write_text_atomically
from prefix_ds.logs import configure_logging
from prefix_ds.opening import check_is_prefix, open_trained, tokenizer_of
from prefix_ds.run_folder import open_run
from prefix_ds.writing import Written, tell_far, write_outputs


@dataclass(frozen=True)
class Request:
    """What to write: for one prompt, or for a file of records; to a file, or to the terminal."""

    prompt: str | None = None
    input_file: Path | None = None
    output_file: Path | None = None
    without_prefix: bool = False


def generate(run: Path, overrides: Sequence[str], request: Request) -> None:
    """Writes text with a run's prefix and shows or saves it. Raises PrefixError. Every rank calls this."""
    configure_logging()
    folder, config = open_run(run, overrides)
    check_request(config, request)
    with joined_world() as world, peers_may_die():
        on_first(world, lambda: _check_place(request.output_file))
        tokenizer = together(lambda: tokenizer_of(folder, config))
        prompts = first_here_first(world, lambda: _prompts(config, request, tokenizer))
        _check_same(prompts)
        opened = open_trained(folder, config, world, with_prefix=not request.without_prefix)
        if world.is_first:
            tell_cut(prompts, config.data.max_length)
            tell_far(opened, prompts, config.generate)
        written = write_outputs(opened, prompts, config.generate, world)
        on_first(world, lambda: _deliver(written, request.output_file))


def check_request(config: RunConfig, request: Request) -> None:
    """Raises ConfigError or RunError for what would come to light only after the work."""
    if request.prompt is not None and request.input_file:
        raise ConfigError("--prompt and --input: one of them says what to write for; leave the other out")
    if request.prompt is None and not request.input_file and not config.data.test:
        raise ConfigError("nothing to write for: give --prompt, --input, or data.test")
    if request.without_prefix:
        check_is_prefix(config)
    output = request.output_file
    if output and ((output.exists() and not output.is_file()) or not output.parent.is_dir()):
        raise RunError(f"--output: {output}: expected a file in a folder that exists")
    if output and request.input_file and output.resolve() == request.input_file.resolve():
        raise RunError(f"--output: {output}: is what --input names; it would be lost")


def _check_place(output: Path | None) -> None:
    if output:
        check_can_write(output.parent)


def _prompts(config: RunConfig, request: Request, tokenizer: Any) -> list[Prompt]:
    data = config.data
    if request.prompt is not None:
        return [prompt_of_text(request.prompt, data, tokenizer)]
    if request.input_file:
        source = str(request.input_file)
        return read_prompts(source, "--input", data, tokenizer, data.max_length, references=False)
    assert data.test
    return read_prompts(data.test, "data.test", data, tokenizer, data.max_length, references=True)


def _check_same(prompts: Sequence[Prompt]) -> None:
    """Raises DataError on all ranks where some have others: they take their parts of one list."""
    digest = hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()
    check_same(
        digest,
        lambda others, first: DataError(
            f"{others}: other prompts than on {first}: the same files and tokenizer are needed everywhere"
        ),
    )


def _deliver(written: Sequence[Written], output: Path | None) -> None:
    if output:
        rows = [{"prompt": w.prompt, "output": w.output, "references": w.references} for w in written]
        write_text_atomically(
            output.resolve(), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
    else:
        for w in written:
            sys.stdout.write(f"{w.output}\n" if len(written) == 1 else f"{w.prompt!r}\n  -> {w.output!r}\n")
