"""A TCP proxy before a server, in threads of this process: it can be cut off, or lose answers."""

import select
import socket
import threading
from types import TracebackType

POLL_S = 0.02


class Proxy:
    """`up`: whether connections are let through. `lose_answers_after`: connections whose answers
    still come; after these, what the server says is thrown away."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self.up = True
        self.lose_answers_after: int | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = True
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while self._open:
            if select.select([self._listener], [], [], POLL_S)[0]:
                caller, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        with caller:
            if not self.up:
                return
            with socket.create_connection(self._target) as server:
                self._forward(caller, server)

    def _forward(self, caller: socket.socket, server: socket.socket) -> None:
        while self._open and self.up:
            ready, _, _ = select.select([caller, server], [], [], POLL_S)
            for source in ready:
                try:
                    content = source.recv(1 << 16)
                except ConnectionError:
                    return
                if not content:
                    return
                if source is server and self._loses_this_answer():
                    return
                (server if source is caller else caller).sendall(content)

    def _loses_this_answer(self) -> bool:
        if self.lose_answers_after is None:
            return False
        self.lose_answers_after -= 1
        return self.lose_answers_after < 0
