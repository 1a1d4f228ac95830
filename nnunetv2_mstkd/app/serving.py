"""Running the server of the page until it is interrupted."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import webbrowser
from collections.abc import Iterator

import uvicorn

from nnunetv2_mstkd.app.server import ANY_ADDRESS, Settings, make_app
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.inference.predictor import Predictor

CLOSE_SECONDS = 2
"""How long an open page may take to notice that the server ends."""


def serve(predictor: Predictor, settings: Settings, port: int = 0, *, browser: bool = True) -> None:
    """Serve the page of a model until Ctrl-C, SIGTERM, or until the terminal is closed.

    Parameters
    ----------
    port
        0 for a free one.
    browser
        Open the page in the browser.

    Raises
    ------
    InputError
        If the address cannot be used.
    """
    server, listening, address = make_server(predictor, settings, port)
    print(f"{address}\nCtrl-C ends; research software, not a medical device", flush=True)
    if browser:
        threading.Timer(1, webbrowser.open, [address]).start()
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, server.handle_exit)  # uvicorn handles the two others alone
    with contextlib.suppress(KeyboardInterrupt), listening:  # uvicorn ends in good order and then repeats the signal
        server.run(sockets=[listening])


@contextlib.contextmanager
def served(predictor: Predictor, settings: Settings) -> Iterator[str]:
    """Serve the page in a thread while the block runs, and yield its address; for tests and other programs."""
    server, listening, address = make_server(predictor, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    with listening:
        thread.start()
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(CLOSE_SECONDS + 30)


def make_server(predictor: Predictor, settings: Settings, port: int = 0) -> tuple[uvicorn.Server, socket.socket, str]:
    """Return a server, the socket that it listens at, and the address of the page, with the token if there is one."""
    app = make_app(predictor, settings)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, port), family=family)
    except OSError as error:
        raise InputError(
            f"the address {settings.host}:{port} cannot be used ({error.strerror}); choose another --host or --port"
        ) from error
    host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
    if settings.host in ANY_ADDRESS:
        host = socket.gethostname()
    address = f"http://{host}:{listening.getsockname()[1]}/" + (f"?token={settings.token}" if settings.token else "")
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=CLOSE_SECONDS)
    return uvicorn.Server(config), listening, address
