"""Runs a function on several ranks, in real processes that talk over gloo.

The processes come from a fork server that has the heavy packages loaded, so a test pays for torch and
DeepSpeed once.
"""

import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import Connection

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "deepspeed", "transformers", "datasets", "prefix_ds.train"])


def on_ranks(size, work, *arguments, timeout_seconds=240):
    """The results of `work(*arguments)` on ranks 0 to size - 1; a failure on any of them is raised here."""
    port = free_port()
    started = []
    for rank in range(size):
        mine, theirs = FORKSERVER.Pipe()
        process = FORKSERVER.Process(
            target=_rank, args=(theirs, rank, size, port, work, arguments), daemon=False
        )
        process.start()
        theirs.close()
        started.append((process, mine))
    try:
        return [_result(process, pipe, timeout_seconds) for process, pipe in started]
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(rank, size, port):
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PREFIX_DS_THREADS": "1",
    }


def _result(process, pipe: Connection, timeout_seconds):
    if not pipe.poll(timeout_seconds):
        raise TimeoutError("a rank did not answer")
    try:
        kind, value = pipe.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a rank died with exit code {process.exitcode}") from None
    if kind == "failed":
        error, text = value
        raise error from RuntimeError(text)
    return value


def _rank(pipe, rank, size, port, work, arguments):
    os.environ.update(rank_environment(rank, size, port))
    try:
        pipe.send(("done", work(*arguments)))
    except BaseException as error:  # it is raised in the test
        pipe.send(("failed", (_sendable(error), traceback.format_exc())))


def _sendable(error):
    try:
        return type(error)(*error.args)
    except TypeError:
        return RuntimeError(repr(error))
