"""
Plants bugs, one at a time, and looks whether the tests notice.

C{python -m tests.planted_bugs} copies the project to a temporary directory for
each, changes one line, and runs the tests named for it until one fails.  A bug
that survives, or that cannot be planted any more because its line has changed,
makes the whole run a failure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: Seconds until a run of tests counts as hung, which is a way of noticing, too.
DEADLINE = 240

CORE = ("tests/test_core_session.py", "tests/test_core_stream.py", "tests/test_resume_core.py")
LINKS = ("tests/test_resume_core.py", "tests/test_resume_links.py")
BUDGET = ("tests/test_budget.py", "tests/test_properties_budget.py")
PEERS = ("tests/test_resume_peer.py", "tests/test_resume_links.py", "tests/test_net_peers.py")
REACTOR = ("tests/test_reactor.py",)
APART = ("tests/test_apart.py", "tests/test_given_up.py")


@dataclass(frozen=True)
class Bug:
    """
    One line that is wrong.

    @ivar what: what a careless change would have done.
    @ivar file: below C{relaymux/}.
    @ivar right: text that is there exactly once.
    @ivar wrong: what to put there.
    @ivar tests: files, the likeliest first.
    """

    what: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


BUGS = (
    Bug(
        "sending again begins one frame late",
        "core/outbox.py",
        "self._again = deque(self.replay.unacknowledged())",
        "self._again = deque(list(self.replay.unacknowledged())[1:])",
        LINKS,
    ),
    Bug(
        "frames are sent again in the wrong order",
        "core/outbox.py",
        "frame = self._again.popleft()",
        "frame = self._again.pop()",
        LINKS,
    ),
    Bug(
        "FIN is not kept for a new link",
        "core/outbox.py",
        "self._emit(out, encode(Kind.FIN, stream_id, FIN.pack(send.window.sent)))",
        "out.append(encode(Kind.FIN, stream_id, FIN.pack(send.window.sent)))",
        CORE,
    ),
    Bug(
        "an ack says more than was accepted",
        "core/link.py",
        "return encode(Kind.ACK, 0, OFFSET.pack(session.rx_next))",
        "return encode(Kind.ACK, 0, OFFSET.pack(session.rx_next + 12))",
        ("tests/test_core_link.py", *CORE),
    ),
    Bug(
        "credit is given for what arrived, not for what was taken",
        "core/window.py",
        "self.granted = max(self.granted, self.consumed + self.size)",
        "self.granted = max(self.granted, self.received + self.size)",
        CORE,
    ),
    Bug(
        "the replay buffer has no bound",
        "core/replay.py",
        "return max(0, self.capacity - self.held_bytes - FRAME_COST * len(self._frames))",
        "return self.capacity",
        CORE,
    ),
    Bug(
        "silence is never noticed",
        "core/link.py",
        "if now >= self._heard_at + self._silence:",
        "if now >= self._heard_at + 1000 * self._silence:",
        ("tests/test_core_link.py", *PEERS),
    ),
    Bug(
        "the old link is left as it is when a new one resumes",
        "net/holder.py",
        "            old.link.detach()\n            old.abort()\n",
        "",
        ("tests/test_resume_links.py", "tests/test_resume_peer.py"),
    ),
    Bug(
        "who resumes is not asked for its name",
        "net/held.py",
        "identity != self.identity or not",
        "not",
        LINKS,
    ),
    Bug(
        "the proof of a RESUME is not looked at",
        "core/resume.py",
        "return hmac.compare_digest(expected, self.proof) and named",
        "return named",
        LINKS,
    ),
    Bug(
        "the answer to a RESUME is not looked at",
        "net/keeper.py",
        "if held is None or not held.is_answered_by(resume, link.exporter):",
        "if held is None:",
        LINKS,
    ),
    Bug(
        "an old generation may resume",
        "net/held.py",
        "if not self.generation < resume.generation <= MAX_GENERATION:",
        "if not resume.generation <= MAX_GENERATION:",
        LINKS,
    ),
    Bug(
        "a session is resumed at an offset that is not there",
        "net/held.py",
        "if not self.streams.session.replay.can_continue_at(resume.rx_next):",
        "if resume.rx_next < 0:",
        LINKS,
    ),
    Bug(
        "streams of a lost session end as if they had finished",
        "net/streams.py",
        "        for stream in list(self._streams.values()):\n            stream.ended(Failure(error))\n",
        "        for stream in list(self._streams.values()):\n            stream.closed()\n",
        PEERS,
    ),
    Bug(
        "what was not delivered is not counted",
        "net/holder.py",
        "self.undelivered += lost + stuck + streams.undelivered",
        "self.undelivered += streams.undelivered",
        PEERS,
    ),
    Bug(
        "a session without a link never ends",
        "net/holder.py",
        "held.timer = self._reactor.callLater(seconds, self._expired, held, seconds)",
        "held.timer = self._reactor.callLater(1000 * seconds, self._expired, held, seconds)",
        PEERS,
    ),
    Bug(
        "a proof is not tied to the TLS connection it is given on",
        "net/link.py",
        "if not IExportingTransport.providedBy(transport):",
        "if IExportingTransport.providedBy(transport):",
        ("tests/test_tls.py", *PEERS),
    ),
    Bug(
        "windows grow by more than they draw from the memory of the daemon",
        "core/growth.py",
        "            self._resize(window, window.size + amount)\n            window.drawn += amount\n",
        "            window.size *= 2\n            window.drawn += amount\n",
        BUDGET,
    ),
    Bug(
        "a direction that has ended keeps what its window has drawn",
        "core/growth.py",
        "        self.account.give_back(window.drawn)\n        window.drawn = 0\n",
        "        window.drawn = 0\n",
        BUDGET,
    ),
    Bug(
        "a window that shrinks gives back what is still promised",
        "core/growth.py",
        "surplus = window.drawn - max(window.size, window.granted - window.consumed)",
        "surplus = window.drawn - window.size",
        BUDGET,
    ),
    Bug(
        "disks that are ended together end in the same moment",
        "net/apart.py",
        "wait = 0.0 if self._hurries else self._free_at - self._reactor.seconds()",
        "wait = 0.0",
        APART,
    ),
    Bug(
        "a daemon that stops leaves disks waiting for their end",
        "service/sockets.py",
        "            served.connections.hurry()\n",
        "            pass\n",
        APART,
    ),
    Bug(
        "a libvirt that has closed is not seen while what it had sent waits",
        "net/bridge.py",
        "return not self._local_open or self.local.transport.hung_up",
        "return not self._local_open",
        APART,
    ),
    Bug(
        "any control connection that is closed ends the disks",
        "service/abandoned.py",
        " <= disk.began < min(there, default=inf):",
        " <= disk.began:",
        APART,
    ),
    Bug(
        "each stream's window may grow as the first one's",
        "core/growth.py",
        "turn = self.turn if self.grown >= FIRST_BYTES else FIRST_TURN_SECONDS",
        "turn = FIRST_TURN_SECONDS",
        BUDGET,
    ),
    Bug(
        "what a window had grown by counts after its stream has ended",
        "core/growth.py",
        "        window.drawn = 0\n        self._resize(window, window.least)\n",
        "        window.drawn = 0\n",
        BUDGET,
    ),
    Bug(
        "the reactor looks at no new timer while sockets have something to read",
        "net/reactor.py",
        " or this._newTimedCalls",
        "",
        REACTOR,
    ),
    Bug(
        "nor at other threads",
        "net/reactor.py",
        " or this.threadCallQueue",
        "",
        REACTOR,
    ),
    Bug(
        "a dialler gives up for good when an endpoint raises",
        "net/dialer.py",
        "maybeDeferred(endpoint.connect, self._factory)",
        "endpoint.connect(self._factory)",
        ("tests/test_net_dialer.py",),
    ),
)


def caught_by(bug: Bug) -> str:
    """
    @return: the test that fails with C{bug}; empty if none does.
    @raise ValueError: C{bug.right} is not there exactly once.
    """
    with tempfile.TemporaryDirectory(prefix="relaymux-planted-") as place:
        copy = Path(place)
        for name in ("relaymux", "tests", "twisted", "docs", "etc"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.cache"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / "relaymux" / bug.file
        text = file.read_text(encoding="utf-8")
        if text.count(bug.right) != 1:
            raise ValueError(f"{bug.file} has {bug.right!r} {text.count(bug.right)} times")
        file.write_text(text.replace(bug.right, bug.wrong), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *bug.tests]
        environment = {**os.environ, "PYTHONPATH": place, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=DEADLINE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no end within {DEADLINE} s"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed:
        return failed[1]
    if done.returncode:
        raise ValueError(f"the tests did not run: {done.stdout[-500:]}{done.stderr[-500:]}")
    return ""


def main() -> int:
    """@return: the exit status: 0 if every bug was caught."""
    caught = 0
    for bug in BUGS:
        try:
            test = caught_by(bug)
        except ValueError as error:
            print(f"NOT PLANTED  {bug.what}: {error}", flush=True)
            continue
        caught += bool(test)
        print(f"{'caught' if test else 'SURVIVED'}  {bug.what}{': ' + test if test else ''}", flush=True)
    print(f"{caught} of {len(BUGS)} caught")
    return 0 if caught == len(BUGS) else 1


if __name__ == "__main__":
    sys.exit(main())
