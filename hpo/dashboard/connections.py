"""The dashboard's connections: whoever opens many, or sends slowly, keeps nobody else out."""

from __future__ import annotations

import logging
import resource
import socket
from typing import Any
from wsgiref.types import WSGIApplication

import waitress  # type: ignore[import-untyped, unused-ignore]
from waitress.channel import HTTPChannel  # type: ignore[import-untyped, unused-ignore]

NUM_THREADS = 8
MAX_CONNECTIONS = 500
CONNECTION_IDLE_S = 20  # how long a connection may go without a whole request
MAX_BODY_BYTES = 1024  # a dashboard that is only read is sent none


class Connection(HTTPChannel):  # type: ignore[misc, unused-ignore]
    """A connection that is closed without a whole request in CONNECTION_IDLE_S, or earlier where others need its place.

    One more than the server's `max_connections` closes the one that has been idle longest.
    """

    last_activity: float  # seconds since 1970

    def add_channel(self, map: Any = None) -> None:
        """Count the connection among the server's, and make room for it."""
        super().add_channel(map)
        others = [other for other in self.server.active_channels.values() if other is not self and not other.will_close]
        if len(others) >= self.server.max_connections:
            idle = [other for other in others if not other.requests]
            min(idle or others, key=lambda other: other.last_activity).will_close = True

    def handle_read(self) -> None:
        """Read what was sent; a part of a request is no activity, or a byte now and then would hold the place."""
        last_activity = self.last_activity
        super().handle_read()
        if not self.requests:
            self.last_activity = last_activity


def make_server(app: WSGIApplication, listener: socket.socket) -> Any:
    """Return the server of an application at a socket that listens; its `run` returns at Ctrl-C."""
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a flood would write a line for each request
    server = waitress.create_server(
        app,
        sockets=[listener],
        threads=NUM_THREADS,
        connection_limit=2 * MAX_CONNECTIONS,  # never reached: connections make room before
        channel_timeout=CONNECTION_IDLE_S,
        cleanup_interval=CONNECTION_IDLE_S // 4,
        max_request_body_size=MAX_BODY_BYTES,
        asyncore_use_poll=True,  # select() knows no file descriptor above 1023
    )
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    server.channel_class = Connection
    server.max_connections = MAX_CONNECTIONS if num_files < 0 else min(MAX_CONNECTIONS, num_files // 2)
    return server
