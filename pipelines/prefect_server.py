"""Calls a flow so that Prefect hears how it ended: the server of this command outlives Ctrl-C, and a lost one is told.

Without PREFECT_API_URL Prefect starts a server of its own for the time of the process. A Ctrl-C in a terminal reaches
it too, as a member of the same group; it would end before the flow could say so, and the run would be `Running` for
ever. So it is started deaf to that signal: it ends with the process, by Prefect's own exit handler.
"""

from __future__ import annotations

import inspect
import signal
import sys
import threading
from collections.abc import Iterator
from functools import wraps
from typing import Any, TypeVar

import httpx
from prefect import Flow, State
from prefect.settings import get_current_settings

from ops.errors import StorageError

T = TypeVar("T")


def run_flow(flow: Flow[..., T], *arguments: Any, **named: Any) -> T:
    """The flow's result. Raises StorageError where Prefect's server does not answer, at the start or any more.

    A server that is lost only when the work is done, and can't be told, costs a line of warning: what is committed is.
    """
    ended: list[Any] = []

    @wraps(flow.fn)
    def body(*arguments: Any, **named: Any) -> Any:
        ended.append(flow.fn(*arguments, **named))
        return ended[0]

    # Prefect resolves names of annotations in the module of the function: here nobody knows the flow's settings.
    body.__signature__ = inspect.signature(flow.fn, eval_str=True)  # type: ignore[attr-defined]
    told = flow.with_options()
    told.fn = body
    try:
        _start_server()
        result: T = told(*arguments, **named)
        return result
    except Exception as error:
        if not any(isinstance(cause, httpx.TransportError) for cause in _causes(error)):
            raise
        address = get_current_settings().api.url or "of this command"
        if ended:
            text = f"Prefect's server {address} does not answer ({type(error).__name__}) and was not told the end."
            print(f"{flow.name:<11} {text} The work is done.", file=sys.stderr, flush=True)
            result = ended[0].result() if isinstance(ended[0], State) else ended[0]
            return result
        raise StorageError(
            f"Prefect's server {address} does not answer ({type(error).__name__}).",
            "What is committed stays. Start the server, or unset PREFECT_API_URL, and run the same command again.",
        ) from error


def stop_server() -> None:
    """For those who leave without exit handlers."""
    from prefect.server.api.server import SubprocessASGIServer

    SubprocessASGIServer().stop()


def _start_server() -> None:
    if get_current_settings().api.url:
        return
    from prefect.server.api.server import SubprocessASGIServer

    failures: list[BaseException] = []

    def start() -> None:
        # A signal mask is inherited, and uvicorn's own handlers do not lift it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            SubprocessASGIServer().start()
        except BaseException as error:  # carried to the thread that waits
            failures.append(error)

    thread = threading.Thread(target=start, name="prefect-server", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # in pieces: a Ctrl-C while it starts is heard
    if failures:
        raise failures[0]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
