"""Listens for the requests to a reward server, by uvicorn."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from posttrain.errors import PosttrainError
from posttrain.scoring.server.connections import KEEP_ALIVE_SECONDS, MAX_HEAD_BYTES, Connection
from posttrain.scoring.server.limits import Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STOP_SECONDS = 5
"""When the server is told to stop, requests that are scored get this long."""


def configured(app: FastAPI, limits: Limits) -> uvicorn.Config:
    """The settings with which uvicorn serves ``app`` within ``limits``."""
    return uvicorn.Config(
        app,
        http=type("LimitedConnection", (Connection,), {"limits": limits}),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )


def serve(app: FastAPI, host: str, port: int, limits: Limits, ready: Callable[[str], None]) -> None:
    """Serve ``app`` until interrupted. ``ready`` is called with the address once requests are accepted.

    Port 0 lets the system choose a free one. Raises PosttrainError if the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise PosttrainError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    # without it an answer's body arrives 40 ms after its head (Nagle's algorithm, delayed ACK)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with listening:
        url_host = f"[{host}]" if ":" in host else host
        ready(f"http://{url_host}:{listening.getsockname()[1]}")
        uvicorn.Server(configured(app, limits)).run(sockets=[listening])


def check_exposure(host: str, token: str | None) -> None:
    """Raise PosttrainError if the network could reach the server and no token is asked for."""
    if host not in LOOPBACK and token is None:
        raise PosttrainError(
            f"--host {host} is open to the network: also give --token-env VAR, the variable with a token"
        )
