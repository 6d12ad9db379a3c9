"""Messages between the launcher and the agent on a node: JSON, a line each, over the agent's standard input
and output, which ssh carries. Both sides send a beat every second, so that each can tell a dead link from one
that has nothing to say.

Knows nothing of what the messages mean.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 8.0  # without a beat: the other side, or the link, is gone
LONGEST_MESSAGE = 1 << 24

Message = dict[str, Any]


class SilentError(Exception):
    """Nothing was heard for too long."""


async def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Sends it; returns when the other side can keep up. One that is gone is found by listening."""
    try:
        writer.write(json.dumps(message).encode() + b"\n")
        await writer.drain()
    except (ConnectionError, RuntimeError):
        return


async def received(reader: asyncio.StreamReader, seconds: float = SILENCE_SECONDS) -> AsyncIterator[Message]:
    """All messages until the other side closes; beats are swallowed. Raises SilentError."""
    while True:
        try:
            line = await asyncio.wait_for(reader.readline(), seconds)
        except TimeoutError:
            raise SilentError from None
        except (ConnectionError, ValueError):  # ValueError: a line that has no end
            return
        if not line.endswith(b"\n"):
            return
        message = _parsed(line)
        if message is not None and "beat" not in message:
            yield message


def _parsed(line: bytes) -> Message | None:
    """None: something else that writes to the same place, such as a shell's start-up file."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


async def beat(writer: asyncio.StreamWriter) -> None:
    """Until it is cancelled."""
    while True:
        await send(writer, {"beat": 1})
        await asyncio.sleep(BEAT_SECONDS)
