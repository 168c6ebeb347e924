"""Whoever opens many connections, or sends slowly, keeps nobody else out of the dashboard."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from hpo.dashboard import connections
from tests.dashboard.examples import application


@contextmanager
def serving() -> Iterator[tuple[Any, tuple[str, int]]]:
    """Serve `application` in a thread; give the server and its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address: tuple[str, int] = listener.getsockname()
        server = connections.make_server(application, listener)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        yield server, address
        for channel in list(server.active_channels.values()):
            channel.will_close = True
        server.will_close = True
        server.close()
        server.task_dispatcher.shutdown()


def status(address: tuple[str, int], **headers: str) -> int:
    connection = http.client.HTTPConnection(*address, timeout=500)
    try:
        connection.request("GET", "/", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def is_closed(client: socket.socket) -> bool:
    client.settimeout(500)
    with suppress(ConnectionResetError):
        return client.recv(1) == b""
    return True


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_a_connection_that_is_used_takes_the_place_of_one_that_is_idle(sent: bytes) -> None:
    with serving() as (server, address), ExitStack() as idle:
        server.max_connections = 5
        clients = [idle.enter_context(socket.create_connection(address)) for _ in range(12)]
        for client in clients:
            client.sendall(sent)
        assert status(address) == 200
        assert all(is_closed(client) for client in clients[:7])  # the oldest first


def test_there_is_room_for_many_connections() -> None:
    with serving() as (server, address), ExitStack() as idle:
        assert server.max_connections >= 250
        for _ in range(200):
            idle.enter_context(socket.create_connection(address))
        assert status(address) == 200


def test_a_request_that_trickles_in_does_not_hold_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECTION_IDLE_S", 0.3)
    with serving() as (_, address), socket.create_connection(address) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: ")
        client.settimeout(0.05)
        while True:  # a byte now and then, until the server hangs up
            try:
                client.sendall(b"x")
                if client.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                return


def test_nobody_sends_more_than_a_dashboard_needs() -> None:
    with serving() as (_, address):
        assert status(address, **{"Content-Length": "1000000000"}) == 413
