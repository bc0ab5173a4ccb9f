"""
The fault proxy in a process of its own, so that it and the threads here do not wait for one another.

As a program (C{python -m tests.faults.wire LISTEN TARGET SEED}) it is that
process: each line of its input is a JSON list of a method's name, positional
and named arguments, each line of output the answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["Wire"]

PROJECT = Path(__file__).parent.parent.parent


class Wire:
    """
    A fault proxy.

    @ivar address: where to connect to.
    """

    def __init__(self, target: str, seed: int, listen: str = "127.0.0.1:0") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, listen, target, str(seed)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address: str = self._answer()

    def do(self, method: str, *args: object, **kwargs: object) -> Any:
        """Call a method of the L{FaultProxy}; see there."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([method, args, kwargs]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def status(self) -> dict[str, int]:
        """See L{FaultProxy.status}."""
        status: dict[str, int] = self.do("status")
        return status

    def events(self) -> list[str]:
        """What happened, oldest first."""
        events: list[str] = self.do("told")
        return events

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the fault proxy ended with status {self.process.wait()}"
        answer = json.loads(line)
        assert "error" not in answer, answer
        return answer["value"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def main(listen: str, target: str, seed: str) -> None:
    """Serve one proxy until the input ends."""
    from twisted.internet import reactor
    from twisted.internet.stdio import StandardIO
    from twisted.protocols.basic import LineReceiver

    from relaymux.errors import RelaymuxError
    from relaymux.testing.faults import Ending, FaultProxy

    proxy = FaultProxy(reactor, listen, target, seed=int(seed))

    class Control(LineReceiver):
        delimiter = b"\n"

        def connectionMade(self) -> None:
            proxy.start()
            self.answer(value=proxy.address)

        def lineReceived(self, line: bytes) -> None:
            method, args, kwargs = json.loads(line)
            if "ending" in kwargs:
                kwargs["ending"] = Ending(kwargs["ending"])
            try:
                if method == "told":
                    self.answer(value=[str(event) for event in proxy.events])
                else:
                    self.answer(value=getattr(proxy, method)(*args, **kwargs))
            except RelaymuxError as error:
                self.answer(error=str(error))

        def answer(self, **answer: object) -> None:
            self.sendLine(json.dumps(answer, default=str).encode())

        def connectionLost(self, reason: Any = None) -> None:
            if reactor.running:
                reactor.stop()

    StandardIO(Control())
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
