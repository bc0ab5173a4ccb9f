"""What the two relays have to show for themselves after a machine has moved."""

from __future__ import annotations

import re
from collections.abc import Sequence

from relaymux.testing.libvirt.faults import Strike
from relaymux.testing.libvirt.relays import Relays
from relaymux.testing.qemu.rehearsal import Check

__all__ = ["relay_checks"]

_DISK = re.compile(r"is disk (\S+),")


async def relay_checks(
    relays: Relays, disks: int, strikes: Sequence[Strike] = (), wanted: int = 0
) -> list[Check]:
    """
    @param relays: closed, after one move.
    @param disks: how many were copied.
    @param strikes: what was done to the link, each of which it has to survive.
    @param wanted: how often something was to be done to it.
    """
    dialled = await relays.rig.network.dialled()
    near, far = relays.outages()
    if wanted:
        evidence = f"never more than {relays.most} at a time in {relays.looks} looks at the kernel's list"
        one = Check("one connection at a time joined the hosts", relays.most == 1, evidence)
        lost = sum(outage.lost for outage in near + far)
        seconds = [outage.seconds for outage in near if outage.seconds is not None]
        states = ", ".join(f"{strike.moment.value}: {strike.state}" for strike in strikes)
        survived = Check(
            "the link was lost and nothing else",
            len(strikes) == wanted <= len(seconds) == len(near) and not lost,
            f"{len(strikes)} times ({states}), {lost} bytes lost; "
            f"{sum(outage.again for outage in near + far):,} sent again",
        )
        checks = [one, survived]
    else:
        evidence = f"{dialled} was dialled, and never more than {relays.most} were there at a time"
        checks = [Check("one connection joined the hosts", dialled == relays.most == 1, evidence)]
    names = sorted(set(_DISK.findall(relays.said(0))))
    checks.append(
        Check(
            "each disk was known by its name",
            len(names) == disks,
            f"the relay's log has {', '.join(names) if names else 'none'}",
        )
    )
    statuses = relays.statuses
    checks.append(
        Check(
            "the relays delivered all they had taken",
            statuses == [0, 0],
            f"they ended with status {' and '.join(map(str, statuses))}",
        )
    )
    return checks
