"""A TCP proxy that can refuse, cut or freeze connections."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit, urlunsplit


class Proxy:
    def __init__(self, url: str, default_port: int) -> None:
        self._parts = urlsplit(url)
        self._target = (self._parts.hostname or "localhost", self._parts.port or default_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._frozen: set[socket.socket] = set()
        self.refuses = False
        self.sent = bytearray()
        """By the client."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        port = self._listener.getsockname()[1]
        user, at, _ = self._parts.netloc.rpartition("@")
        return urlunsplit(self._parts._replace(netloc=f"{user}{at}127.0.0.1:{port}"))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.refuses:
                    client.close()
                    continue
                server = socket.create_connection(self._target)
                self._sockets += [client, server]
                for trio in ((client, server, self.sent), (server, client, bytearray())):
                    threading.Thread(target=self._copy, args=trio, daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, copy: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source not in self._frozen:
                    copy += data
                    target.sendall(data)
        if source not in self._frozen:
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Ends all connections."""
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def freeze(self) -> None:
        """All connections stay open, and carry nothing any more, not even their end."""
        self._frozen.update(self._sockets)
        self._sockets.clear()

    def close(self) -> None:
        self._listener.close()
        self._sockets += self._frozen
        self.cut()
