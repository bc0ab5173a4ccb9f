"""What is read out of an NBD handshake that passes by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from relaymux.core import nbd
from relaymux.core.nbd import LONGEST, MOST_OPTIONS, MOST_PENDING, Export, Handshake, State

Side = Literal["client", "server"]
Talk = list[tuple[Side, bytes]]

GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
FLAGS = b"\x00\x00\x00\x03"
NAME = b"drive-virtio-disk0"

#: 128 MiB, as QEMU 7.2's server says it, and its block sizes.
INFO_EXPORT = b"\x00\x00" + b"\x00\x00\x00\x00\x08\x00\x00\x00" + b"\x0d\xef"
INFO_BLOCK_SIZE = b"\x00\x03" + b"\x00\x00\x00\x01" + b"\x00\x00\x10\x00" + b"\x02\x00\x00\x00"


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + number.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    head = b"\x00\x03\xe8\x89\x04\x55\x65\xa9"
    return head + number.to_bytes(4, "big") + kind.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data


def named(name: bytes) -> bytes:
    """The data of GO and INFO, asking for the name, the description and the block size."""
    return len(name).to_bytes(4, "big") + name + b"\x00\x03\x00\x01\x00\x02\x00\x03"


#: As QEMU's client and server talk: structured replies, a meta context, GO.
QEMU: Talk = [
    ("server", GREETING),
    ("client", FLAGS),
    ("client", option(8)),
    ("server", reply(8, 1)),
    (
        "client",
        option(10, len(NAME).to_bytes(4, "big") + NAME + b"\x00\x00\x00\x01\x00\x00\x00\x0fbase:allocation"),
    ),
    ("server", reply(10, 4, b"\x00\x00\x00\x01base:allocation")),
    ("server", reply(10, 1)),
    ("client", option(7, named(NAME))),
    ("server", reply(7, 3, INFO_EXPORT)),
    ("server", reply(7, 3, INFO_BLOCK_SIZE)),
    ("server", reply(7, 1)),
]

#: A client that knows no GO.
OLDER: Talk = [
    ("server", GREETING),
    ("client", FLAGS),
    ("client", option(3)),
    ("server", reply(3, 2, b"\x00\x00\x00\x03vda")),
    ("server", reply(3, 1)),
    ("client", option(1, b"vda")),
    ("server", b"\x00\x00\x00\x00\x00\x10\x00\x00" + b"\x01\x01"),
]

DISK0 = Export("drive-virtio-disk0", 128 * 1024 * 1024)


def run(talk: Iterable[tuple[Side, bytes]]) -> Handshake:
    handshake = Handshake()
    for side, data in talk:
        feed = handshake.from_client if side == "client" else handshake.from_server
        feed((memoryview(data),))
    return handshake


class KnownTests(SynchronousTestCase):
    """Handshakes that say what they are about."""

    def test_qemu(self) -> None:
        """QEMU's: decided with the last byte of the server's ACK, not before."""
        self.assertEqual(run(QEMU[:-1]).state, State.UNDECIDED)
        handshake = run([*QEMU[:-1], ("server", QEMU[-1][1][:-1])])
        self.assertEqual((handshake.state, handshake.export), (State.UNDECIDED, None))
        handshake = run(QEMU)
        self.assertEqual((handshake.state, handshake.export), (State.NBD, DISK0))

    def test_without_go(self) -> None:
        """EXPORT_NAME is answered without a header, with zeroes behind it or without."""
        for zeroes in (b"", bytes(124)):
            handshake = run([*OLDER, ("server", zeroes)])
            self.assertEqual((handshake.state, handshake.export), (State.NBD, Export("vda", 1024 * 1024)))

    def test_requests_at_once(self) -> None:
        """After EXPORT_NAME a client need not wait for the answer before its first request."""
        handshake = run([*OLDER[:-1], ("client", bytes(3 * LONGEST)), OLDER[-1]])
        self.assertEqual(handshake.export, Export("vda", 1024 * 1024))

    def test_second_try(self) -> None:
        """An export that is not there, then one that is."""
        talk: Talk = [
            *QEMU[:2],
            ("client", option(6, named(b"vda"))),
            ("server", reply(6, 3, INFO_EXPORT)),
            ("server", reply(6, 1)),
            ("client", option(7, named(b"vdx"))),
            ("server", reply(7, (1 << 31) + 6, b"export not present")),
            *QEMU[7:],
        ]
        self.assertEqual(run(talk).export, DISK0)

    def test_pipelined(self) -> None:
        """Answers belong to options in their order."""
        talk: Talk = [
            ("server", GREETING),
            ("client", FLAGS + option(8) + option(7, named(NAME))),
            ("server", reply(8, 1) + reply(7, 3, INFO_EXPORT) + reply(7, 1)),
        ]
        self.assertEqual(run(talk).export, DISK0)

    def test_empty_name(self) -> None:
        """The server's default export."""
        talk: Talk = [*QEMU[:2], ("client", option(7, named(b""))), *QEMU[8:]]
        self.assertEqual(run(talk).export, Export("", DISK0.size))

    def test_names_for_logs(self) -> None:
        """What a client calls its export cannot write lines or colours into a log, nor fill it."""
        for name, shown in (
            (
                b"a\nb\x1b[31m\xff",
                "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}",
            ),
            (b"\xc3\xa9" * 100, "\u00e9" * 79 + "\N{HORIZONTAL ELLIPSIS}"),
            (b"x" * 80, "x" * 80),
        ):
            talk: Talk = [*QEMU[:2], ("client", option(7, named(name))), *QEMU[8:]]
            self.assertEqual(run(talk).export, Export(shown, DISK0.size))


class SurpriseTests(SynchronousTestCase):
    """Whatever else comes is "not NBD", for good."""

    def assert_other(self, *talk: tuple[Side, bytes]) -> None:
        handshake = run(talk)
        self.assertEqual((handshake.state, handshake.export), (State.OTHER, None), talk[-1])
        for side, data in QEMU:
            (handshake.from_client if side == "client" else handshake.from_server)((data,))
        self.assertEqual((handshake.state, handshake.export), (State.OTHER, None))

    def test_greeting(self) -> None:
        """Oldstyle, newstyle that is not fixed, something else."""
        self.assert_other(("server", b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + bytes(2)))
        self.assert_other(("server", b"NBDMAGICIHAVEOPT\x00\x02"))
        self.assert_other(("server", b"SSH-2.0-OpenSSH_9.2p1"))
        self.assert_other(("client", b"QEVM\x00\x00\x00\x03"))

    def test_client(self) -> None:
        """Flags nobody knows, wrong magic, an option that is too long."""
        self.assert_other(("client", b"\x00\x00\x00\x07"))
        self.assert_other(("client", b"\x00\x00\x00\x02"))
        self.assert_other(("client", FLAGS + b"IHAVEOPU" + bytes(8)))
        self.assert_other(("client", FLAGS + option(8)[:12] + (LONGEST + 1).to_bytes(4, "big")))

    def test_no_disk(self) -> None:
        """A client that encrypts, or that leaves."""
        for number in (2, 5):
            self.assert_other(("server", GREETING), ("client", FLAGS + option(number)))

    def test_go(self) -> None:
        """Its data is too short for what it announces."""
        for data in (b"", b"\x00\x00\x00\x00\x00", b"\x00\x00\x00\x01a\x00", b"\xff\xff\xff\xffvda\x00\x00"):
            self.assert_other(("client", FLAGS + option(7, data)))

    def test_answers(self) -> None:
        """To nothing, to another option, with wrong magic, too long, without a size."""
        for answer in (
            reply(8, 1),
            b"\x00" + reply(7, 1),
            reply(7, 1),
            reply(7, 3, b"\x00"),
            reply(7, 3, INFO_EXPORT + b"\x00"),
            reply(7, 3)[:16] + (LONGEST + 1).to_bytes(4, "big"),
        ):
            self.assert_other(
                ("server", GREETING), ("client", FLAGS + option(7, named(NAME))), ("server", answer)
            )
        self.assert_other(("server", GREETING + reply(0, 1)))

    def test_too_much(self) -> None:
        """A handshake without end is not followed."""
        self.assert_other(("client", FLAGS + option(8) * (MOST_PENDING + 1)))
        one: Talk = [("client", option(8)), ("server", reply(8, 1))]
        self.assert_other(("server", GREETING), ("client", FLAGS), *(one * (MOST_OPTIONS + 1)))

    def test_memory(self) -> None:
        """However much passes by undecided, no more is kept than the longest option."""
        handshake = run([("client", FLAGS + option(8, bytes(LONGEST)))])
        self.assertEqual(handshake.state, State.UNDECIDED)
        handshake.from_client((option(1, b"vda") + bytes(5 * LONGEST),))
        assert handshake._client is not None
        self.assertLess(len(handshake._client._held), LONGEST)

    def test_decided(self) -> None:
        """Afterwards nothing is looked at: the buffers are not even touched."""

        class Untouchable(bytes):
            def __len__(self) -> int:
                raise AssertionError("looked at")

        for talk in (QEMU, OLDER, [("client", b"QEVM")]):
            handshake = run(talk)  # type: ignore[arg-type]
            handshake.from_client((Untouchable(),))
            handshake.from_server((Untouchable(),))


class PropertyTests(SynchronousTestCase):
    """However the bytes come."""

    @given(st.sampled_from([QEMU, OLDER]), st.data())
    def test_any_split(self, talk: Talk, data: st.DataObject) -> None:
        """Any cutting of the bytes into buffers and calls gives the same result."""
        handshake = Handshake()
        for side, piece in talk:
            feed = handshake.from_client if side == "client" else handshake.from_server
            cuts = sorted(data.draw(st.lists(st.integers(0, len(piece)), max_size=8)))
            parts = [memoryview(piece)[a:b] for a, b in zip([0, *cuts], [*cuts, len(piece)], strict=True)]
            calls = data.draw(st.integers(0, len(parts)))
            feed(parts[:calls])
            feed(parts[calls:])
        expected = run(talk)
        self.assertEqual((handshake.state, handshake.export), (expected.state, expected.export))

    @given(st.lists(st.tuples(st.sampled_from(["client", "server"]), st.binary(max_size=60)), max_size=20))
    def test_garbage(self, talk: Talk) -> None:
        """Never an exception, never a disk."""
        self.assertIsNone(run(talk).export)

    @given(
        st.sampled_from([QEMU, OLDER]),
        st.data(),
    )
    def test_damage(self, talk: Talk, data: st.DataObject) -> None:
        """One byte that is another one: an exception never, and a decided handshake always has its disk."""
        index = data.draw(st.integers(0, len(talk) - 1))
        side, piece = talk[index]
        position = data.draw(st.integers(0, len(piece) - 1))
        damaged = bytearray(piece)
        damaged[position] ^= data.draw(st.integers(1, 255))
        handshake = run([*talk[:index], (side, bytes(damaged)), *talk[index + 1 :]])
        self.assertEqual(handshake.state is State.NBD, handshake.export is not None)

    @given(st.lists(st.integers(0, 12), max_size=8), st.data())
    def test_well_formed(self, numbers: list[int], data: st.DataObject) -> None:
        """Options and replies in any order are survived, too."""
        talk: Talk = [("server", GREETING), ("client", FLAGS)]
        for number in numbers:
            talk.append(("client", option(number, data.draw(st.binary(max_size=30)))))
            kind = data.draw(st.sampled_from([1, 2, 3, 4, (1 << 31) + 1]))
            answered = data.draw(st.sampled_from([number, 7]))
            talk.append(("server", reply(answered, kind, data.draw(st.binary(max_size=30)))))
        handshake = run(talk)
        self.assertEqual(handshake.state is State.NBD, handshake.export is not None)
        self.assertIn(handshake.state, set(nbd.State))
