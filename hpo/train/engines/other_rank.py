"""The process of a rank other than rank 0: it does what rank 0 tells it, and ends when that is gone."""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import traceback
from contextlib import ExitStack
from multiprocessing.connection import Connection

import torch

from hpo.train.engines.ranks import RankEngine, meeting_place
from hpo.train.failures import first_line


def follow_rank_0() -> None:
    """Serve rank 0 over the connection whose number is on the command line."""
    connection = Connection(int(sys.argv[1]))
    rank, device, port, threads, allowlists = pickle.loads(connection.recv_bytes())
    orders: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_receive, args=(connection, orders), daemon=True, name="orders").start()
    torch.set_num_threads(threads)
    engine = RankEngine(rank, device=device)
    connection.send_bytes(pickle.dumps(None))
    with ExitStack() as stack:
        for allowlist in allowlists:
            stack.enter_context(allowlist.importable())
        while True:
            method, arguments = pickle.loads(orders.get())
            try:
                if method == "join":
                    arguments = (meeting_place(rank, port=port),)
                getattr(engine, method)(*arguments)
            except BaseException as error:
                traceback.print_exc()
                connection.send_bytes(pickle.dumps(first_line(error)))
                os._exit(1)
            connection.send_bytes(pickle.dumps(None))


def _receive(connection: Connection, orders: queue.Queue[bytes]) -> None:
    """Take the orders, and end the process, whatever it does, when rank 0 has closed the connection or has died."""
    while True:
        try:
            orders.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    follow_rank_0()
