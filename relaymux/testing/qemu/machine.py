"""One QEMU process with its QMP connection and its serial console."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from relaymux.testing.qemu.console import Console
from relaymux.testing.qemu.tools import QemuTools

__all__ = ["CommandFailed", "Disk", "Event", "Machine", "MachineEnded"]

#: Seconds for QEMU to start and to answer one command.  blockdev-add on a relay
#: whose far side is missing takes the relay's open timeout, 10 s by default.
COMMAND_SECONDS = 30.0

#: Seconds for QEMU to end after a SIGTERM before it is killed.
_END_SECONDS = 5.0


class CommandFailed(Exception):
    """QEMU refused a command, or did not answer."""


class MachineEnded(Exception):
    """QEMU ended by itself; the message has its last words."""


@dataclass(frozen=True)
class Disk:
    """
    A raw image as a virtio disk.

    @ivar name: of its block node, as in C{"vda"}.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class Event:
    """A QMP event."""

    name: str
    data: Mapping[str, Any]


class Machine:
    """
    A virtual machine, as an asynchronous context manager.

    @ivar console: what its guest says.
    @ivar events: QMP events since the start or L{forget_events}, oldest first.
        At most a few per migration phase, so they are all kept.
    """

    def __init__(
        self,
        tools: QemuTools,
        name: str,
        directory: Path,
        memory: int,
        disks: Sequence[Disk],
        *,
        incoming: bool = False,
    ) -> None:
        """
        @param name: for messages and file names.
        @param directory: private, with a short path; for the QMP socket and the log.
        @param memory: in MiB.
        @param incoming: wait for an incoming migration instead of booting.
        """
        self.name = name
        self.disks = tuple(disks)
        self.console = Console()
        self.events: list[Event] = []
        self._tools = tools
        self._socket = directory / f"{name}.qmp"
        self._log = directory / f"{name}.log"
        self._arguments = tools.machine_arguments(memory)
        self._arguments += ["-serial", "stdio", "-chardev", f"socket,id=qmp,path={self._socket}"]
        self._arguments += ["-mon", "chardev=qmp,mode=control"]
        for disk in disks:
            self._arguments += ["-blockdev", f"driver=file,filename={disk.path},node-name={disk.name}"]
            self._arguments += ["-device", f"virtio-blk-pci,drive={disk.name},id=device-{disk.name}"]
        if incoming:
            self._arguments += ["-S", "-incoming", "defer"]
        self._changed = asyncio.Condition()
        self._qmp = QMPClient(name)
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Machine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def pid(self) -> int:
        """Of the QEMU process."""
        assert self._process is not None, "not started"
        return self._process.pid

    async def start(self) -> None:
        """
        Start QEMU and wait until it takes commands.

        @raise MachineEnded: it did not start.
        """
        await self._qmp.start_server(str(self._socket))
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments,
                env=self._tools.environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        self._spawn(self.console.read_from(self._process.stdout))
        self._spawn(self._watch_process(self._process))
        listener = EventListener()
        self._qmp.register_listener(listener)
        self._spawn(self._listen(listener))
        try:
            await self._unless_ended(self._qmp.accept(), "its QMP greeting")
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End QEMU, wait for it, and have all of its console.  A second call does nothing."""
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _END_SECONDS)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()
        if self._tasks:
            reader, watcher, listener = self._tasks
            listener.cancel()
            await asyncio.gather(reader, watcher)
            self._tasks = []
        try:
            await self._qmp.disconnect()
        except (QMPError, EOFError, OSError):
            # How the connection of an ended process broke is of no interest.
            self._socket.unlink(missing_ok=True)

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """
        @return: what the QMP command returns.
        @raise CommandFailed: with QEMU's own description.
        @raise MachineEnded: QEMU is not there any more.
        """
        return await self._unless_ended(self._qmp.execute(command, arguments), command)

    def forget_events(self) -> None:
        """Start L{events} afresh."""
        self.events.clear()

    async def wait_event(self, wanted: Callable[[Event], bool], what: str, seconds: float) -> Event:
        """
        @param wanted: called with each of L{events}, the past ones too; may
            raise, which ends the waiting.
        @return: the first event wanted.
        @raise CommandFailed: it did not come within C{seconds}.
        @raise MachineEnded: QEMU is not there any more.
        """
        seen = 0
        found: Event | None = None

        def arrived() -> bool:
            nonlocal seen, found
            for event in self.events[seen:]:
                seen += 1
                if wanted(event):
                    found = event
                    return True
            return self._process is None or self._process.returncode is not None

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(arrived), seconds)
            except asyncio.TimeoutError:
                raise CommandFailed(f"{self.name}: no {what} within {seconds:g} s") from None
        if found is None:
            raise MachineEnded(f"{self.name}: waiting for {what}: {self._last_words()}")
        return found

    async def _unless_ended(self, action: Any, what: str) -> Any:
        """Await a QMP C{action}, but not longer than QEMU lives and L{COMMAND_SECONDS}."""
        task = asyncio.ensure_future(action)
        try:
            await asyncio.wait(
                {task, self._tasks[1]}, timeout=COMMAND_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                return task.result()
            if self._tasks[1].done():
                raise MachineEnded(f"{self.name}: {what}: {self._last_words()}")
            raise CommandFailed(f"{self.name}: no answer to {what} within {COMMAND_SECONDS:g} s")
        except ExecuteError as error:
            raise CommandFailed(f"{self.name}: {what}: {error}") from error
        except QMPError as error:
            # The connection breaks a moment before the process can be waited for.
            await asyncio.wait({self._tasks[1]}, timeout=1)
            raise MachineEnded(f"{self.name}: {what}: {error}; {self._last_words()}") from error
        finally:
            task.cancel()

    async def _listen(self, listener: EventListener) -> None:
        async for message in listener:
            data = message.get("data", {})
            assert isinstance(data, dict)
            self.events.append(Event(str(message["event"]), data))
            async with self._changed:
                self._changed.notify_all()

    async def _watch_process(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        async with self._changed:
            self._changed.notify_all()

    def _spawn(self, action: Any) -> None:
        self._tasks.append(asyncio.ensure_future(action))

    def _last_words(self) -> str:
        status = self._process.returncode if self._process is not None else None
        words = self._log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
        state = "QEMU is running" if status is None else f"QEMU ended with status {status}"
        return f"{state}; its messages: {words}" if words else state
