"""Tells rank 0 at once that another rank's process has died.

A collective operation over gloo fails then, but one over NCCL waits for as long as it is left to.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket

from spion_ds.distributed.agreement import Agreement
from spion_ds.distributed.process_group import Ranks

_SECONDS = 60.0  # for connections that are there already
_FAREWELL = b"."


class Lifelines:
    """A connection of every rank to rank 0, which the system closes when a process ends.

    Every rank makes one, together.

    Args:
        ranks: this process among all.
        agreement: the control channel.

    Raises:
        OSError: rank 0 cannot be reached at MASTER_ADDR.
    """

    def __init__(self, ranks: Ranks, agreement: Agreement) -> None:
        self._others = selectors.DefaultSelector()
        self._own: socket.socket | None = None
        if ranks.world_size == 1:
            return
        server = _listen(ranks.world_size) if ranks.is_first else None
        port, secret = agreement.from_first(lambda: _address(server))
        if server is None:
            place = (os.environ["MASTER_ADDR"], port)
            self._own = socket.create_connection(place, _SECONDS)
            self._own.sendall(_greeting(secret, ranks.rank))
        agreement.barrier()  # all have connected
        if server is not None:
            with server:
                self._accept(server, secret, ranks.world_size)

    def _accept(self, server: socket.socket, secret: bytes, world_size: int) -> None:
        expected = {_greeting(secret, rank): rank for rank in range(1, world_size)}
        size = len(_greeting(secret, 1))
        while expected:
            connection, _ = server.accept()
            connection.settimeout(_SECONDS)
            rank = expected.pop(connection.recv(size, socket.MSG_WAITALL), None)
            if rank is None:  # someone else's
                connection.close()
            else:
                self._others.register(connection, selectors.EVENT_READ, rank)

    def cut(self) -> list[int]:
        """Return the ranks whose process ended without a farewell since the last call."""
        if not self._others.get_map():
            return []
        found = []
        for key, _ in self._others.select(timeout=0):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                last = connection.recv(1)
            except OSError:
                last = b""
            if last != _FAREWELL:
                found.append(key.data)
            self._others.unregister(connection)
            connection.close()
        return sorted(found)

    def say_farewell(self) -> None:
        """Say to rank 0 that this process ends as it should, or has told why not."""
        if self._own is not None:
            with contextlib.suppress(OSError):  # rank 0 may be gone
                self._own.sendall(_FAREWELL)
            self._own.close()


def _listen(world_size: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        server = socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=world_size, dualstack_ipv6=True
        )
    else:
        server = socket.create_server(("", 0), backlog=world_size)
    server.settimeout(_SECONDS)
    return server


def _address(server: socket.socket | None) -> tuple[int, bytes]:
    assert server is not None
    return server.getsockname()[1], secrets.token_bytes(16)


def _greeting(secret: bytes, rank: int) -> bytes:
    return secret + rank.to_bytes(4, "big")
