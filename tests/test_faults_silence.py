"""The fault proxy: blackholes, and late old links."""

from __future__ import annotations

from relaymux.errors import LocalError
from relaymux.testing.fault_lane import BUFFER_BYTES
from tests.proxies import LONG, RESET, FaultProxyTestCase
from tests.sockets import content, reset


class SilenceTests(FaultProxyTestCase):
    """Blackholes."""

    async def test_both_ways(self) -> None:
        """Nothing passes and nothing is read; when it ends, all is there, in order."""
        near, far = await self.pair()
        await self.carries(near, far)
        self.proxy.blackhole()
        before = dict(self.proxy.status())
        await self.send(near, b"up" * 500)
        await self.send(far, b"down" * 500)
        await self.turns()
        self.silent(near)
        self.silent(far)
        self.assertEqual(self.proxy.status(), before)
        self.proxy.blackhole(0)
        self.assertEqual(await self.read(far, 1000), b"up" * 500)
        self.assertEqual(await self.read(near, 2000), b"down" * 500)

    async def test_sender_blocks(self) -> None:
        """The sender's kernel fills up, as it does when no acknowledgement comes."""
        near, far = await self.pair()
        self.proxy.blackhole(sides="up")
        sent = self.fill(near)
        await self.turns()
        self.assertEqual(self.proxy.lanes["up"].received, 0)
        self.proxy.blackhole(0, "up")
        self.assertTrue(await self.read(far, len(sent)) == sent, "bytes differ")

    async def test_one_way(self) -> None:
        """The other direction goes on."""
        near, far = await self.pair()
        self.proxy.blackhole(sides="down")
        await self.send(far, b"lost for now")
        await self.send(near, b"arrives")
        self.assertEqual(await self.read(far, 7), b"arrives")
        self.silent(near)
        self.proxy.blackhole(0, "down")
        self.assertEqual(await self.read(near, 12), b"lost for now")

    async def test_for_a_time(self) -> None:
        """It ends by itself."""
        near, far = await self.pair()
        self.proxy.blackhole(0.05)
        await self.send(near, b"late")
        self.assertEqual(await self.read(far, 4), b"late")
        self.assertFalse(self.proxy.lanes["up"].silent or self.proxy.lanes["down"].silent)

    async def test_new_connection(self) -> None:
        """A new connection is accepted and hears nothing; the target learns of it at the end."""
        self.proxy.blackhole()
        near = self.connect()
        await self.send(near, b"hello?")
        await self.turns()
        self.silent(near)
        self.assertRaises(BlockingIOError, self.target.accept)
        self.proxy.blackhole(0)
        far = await self.accept()
        self.assertEqual(await self.read(far, 6), b"hello?")
        await self.carries(near, far)

    async def test_new_connection_one_way(self) -> None:
        """With one side silent the target gets what the dialler says, and its answer is kept back."""
        self.proxy.blackhole(sides="down")
        near, far = await self.pair()
        await self.send(near, b"question")
        self.assertEqual(await self.read(far, 8), b"question")
        await self.send(far, b"answer")
        await self.turns()
        self.silent(near)

    async def test_ends_are_kept_back(self) -> None:
        """Neither a FIN nor a reset gets through."""
        for end in (lambda peer: peer.close(), reset):
            near, far = await self.pair()
            self.proxy.blackhole(sides="up")
            await self.turns()
            end(near)
            await self.turns()
            self.silent(far)
            self.proxy.blackhole(0)
            self.assertEqual((await self.ending(far))[0], b"")
            far.close()

    async def test_reset_inside_is_kept_back(self) -> None:
        """Also when the proxy has noticed the reset, because it wrote into it."""
        near, far = await self.pair()
        self.proxy.blackhole(sides="up")
        reset(near)
        await self.send(far, b"into nothing")
        await self.until(lambda: self.proxy.lanes["down"].dropped or self.proxy.lanes["down"].delivered, "")
        await self.turns()
        self.silent(far)
        self.proxy.blackhole(0)
        self.assertEqual(await self.ending(far), (b"", RESET))

    async def test_cut_in_a_blackhole(self) -> None:
        """A cut reaches both sides in spite of it."""
        near, far = await self.pair()
        self.proxy.blackhole()
        self.proxy.cut()
        self.assertEqual(await self.ending(near), (b"", RESET))
        self.assertEqual(await self.ending(far), (b"", RESET))


class LateOldLinkTests(FaultProxyTestCase):
    """hold and release."""

    async def test_late_bytes(self) -> None:
        """The dialler sees a reset; later the target gets the held bytes over the connection it still has."""
        near, far = await self.pair()
        await self.carries(near, far)
        data = content(600_000)
        self.assertEqual(self.proxy.hold(len(data), LONG), 1)
        await self.send(near, data)
        self.assertEqual(await self.ending(near), (b"", RESET))
        await self.turns()
        self.silent(far)
        self.assertEqual(self.proxy.status()["buried"], 1)
        new = await self.pair()
        await self.carries(*new)
        self.silent(far)
        self.assertEqual(self.proxy.release(), len(data))
        self.assertTrue(await self.read(far) == data, "the held bytes differ")
        far.close()
        await self.carries(*new)
        self.assertEqual([k for k in self.kinds() if k in ("buried", "released")], ["buried", "released"])

    async def test_what_the_target_sends_is_lost(self) -> None:
        """Bytes for a dialler that is gone are taken and dropped, as many as come."""
        near, far = await self.pair()
        self.proxy.hold(0)
        self.assertEqual(await self.ending(near), (b"", RESET))
        await self.send(far, content(9_000_000))
        self.proxy.release()
        self.assertEqual(await self.read(far), b"")
        await self.until(lambda: self.proxy.lanes["down"].dropped == 9_000_000, "all was dropped")

    async def test_deadline(self) -> None:
        """A dialler that sends less than was asked for is reset after the time."""
        near, far = await self.pair()
        self.proxy.hold(1000, 0.05)
        await self.send(near, b"little")
        self.assertEqual(await self.ending(near), (b"", RESET))
        self.assertEqual(self.proxy.release(), 6)
        self.assertEqual(await self.read(far), b"little")

    async def test_release_before_the_reset(self) -> None:
        """Released too early it was a pause and nothing more."""
        near, far = await self.pair()
        self.proxy.hold(1000, LONG)
        await self.send(near, b"soon")
        await self.until(lambda: self.proxy.status()["up_queued"] == 4, "it was held")
        self.assertEqual(self.proxy.release(), 4)
        self.assertEqual(await self.read(far, 4), b"soon")
        await self.carries(near, far)
        self.assertEqual(self.proxy.status()["cuts"], 0)

    async def test_target_gives_up_first(self) -> None:
        """Held bytes whose connection the target has reset are dropped, and counted."""
        near, far = await self.pair()
        self.proxy.hold(10, LONG)
        await self.send(near, b"0123456789")
        self.assertEqual(await self.ending(near), (b"", RESET))
        reset(far)
        await self.until(lambda: "ended" in self.kinds(), "the old connection ended")
        self.assertEqual(self.proxy.release(), 0)
        self.assertEqual(self.proxy.lanes["up"].dropped, 10)

    async def test_down(self) -> None:
        """The other way round: the target sees the reset."""
        near, far = await self.pair()
        self.proxy.hold(3, LONG, "down")
        await self.send(far, b"abc")
        self.assertEqual(await self.ending(far), (b"", RESET))
        self.silent(near)
        self.proxy.release()
        self.assertEqual(await self.read(near), b"abc")

    async def test_cut_leaves_it(self) -> None:
        """A cut is for the new connections."""
        near, far = await self.pair()
        self.proxy.hold(3, LONG)
        await self.send(near, b"abc")
        self.assertEqual(await self.ending(near), (b"", RESET))
        new, _ = await self.pair()
        self.assertEqual(self.proxy.cut(), 1)
        self.assertEqual(await self.ending(new), (b"", RESET))
        self.proxy.release()
        self.assertEqual(await self.read(far), b"abc")

    async def test_too_much(self) -> None:
        """What is held has a bound."""
        self.assertRaises(LocalError, self.proxy.hold, BUFFER_BYTES + 1)
