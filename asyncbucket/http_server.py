"""What the package's HTTP servers share, the bundled provider and the proxy: uvicorn on a socket."""

import socket
from typing import Any, Final

import uvicorn

#: Thousands of agents may connect in one instant.
_BACKLOG: Final = 4_096
#: Seconds. Longer than any client's own expiry, so no request meets a closing connection.
_KEEP_ALIVE: Final = 600


def configured(app: Any, **options: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for ``app``: it logs no access, and adds no headers."""
    return uvicorn.Config(
        app,
        access_log=False,
        backlog=_BACKLOG,
        date_header=False,
        lifespan="off",
        log_config=None,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        ws="none",
        **options,
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any free one.

    Raises:
        OSError: the address is taken, or not available; the message says which.
        OverflowError: a port is from 0 to 65535.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # `socket.create_server` leaves the protocol at 0, and asyncio sets TCP_NODELAY only for TCP:
    # each reply would wait 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        raise OSError(exc.errno, f"cannot listen on {host}:{port}: {exc.strerror}") from exc
    return listener
