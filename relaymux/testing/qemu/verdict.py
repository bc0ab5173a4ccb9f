"""What two relay daemons have to show for themselves after a migration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from relaymux.testing.qemu.cuts import Cut
from relaymux.testing.qemu.plan import Mode
from relaymux.testing.qemu.rehearsal import Check
from relaymux.testing.qemu.relays import RelayPair

__all__ = ["link_checks", "relay_checks"]


def relay_checks(
    relays: RelayPair, mode: Mode, channels: int, cuts: Sequence[Cut] = (), wanted: int = 0
) -> list[Check]:
    """
    @param relays: closed.
    @param channels: how many multifd was to use.
    @param cuts: those that were made.
    @param wanted: how many were to be.
    """
    checks = link_checks(relays, wanted, cuts)
    ram = {Mode.PLAIN: 1, Mode.MULTIFD: channels + 1, Mode.POSTCOPY: 2}[mode]
    opened = relays.opened()
    checks.append(
        Check(
            "memory and each disk had streams of their own",
            opened == {"ram": ram} | dict.fromkeys(relays.disks, 1),
            ", ".join(f"{name} {count}" for name, count in sorted(opened.items())) + " and no other",
        )
    )
    statuses = relays.statuses
    checks.append(
        Check(
            "the daemons delivered all they had taken",
            statuses == [0, 0],
            f"they ended with status {' and '.join(map(str, statuses))}",
        )
    )
    return checks


def link_checks(relays: RelayPair, wanted: int, cuts: Sequence[Cut] = ()) -> list[Check]:
    """
    What concerns the link alone.

    @param wanted: how often it was to be cut.
    @param cuts: in which phases it was, if that is known.
    """
    watch = relays.watch
    assert watch is not None, "not started"
    links = relays.links_up()
    if not wanted:
        once = Check(
            "one connection joined the two daemons",
            len(watch.accepted) == watch.most == 1 and links == [1, 1],
            f"the kernel named {len(watch.accepted)} in {watch.looks} looks ({', '.join(watch.accepted)}); "
            f"the logs have {links[0]} and {links[1]} links",
        )
        return [once]
    near, far = relays.outages()
    # One that lives less than the time between two looks may be missed.
    possible = 1 < len(watch.accepted) <= wanted + 1 and len(watch.dialled) <= wanted + 1
    once = Check(
        "one connection at a time joined the two daemons",
        possible and watch.most == 1 and links == [1, 1],
        f"in {watch.looks} looks the kernel named {len(watch.accepted)}, and {watch.most} at a time; "
        f"the logs have {links[0]} and {links[1]} sessions",
    )
    seconds = [outage.seconds for outage in near if outage.seconds is not None]
    lost = sum(outage.lost for outage in near + far)
    phases = Counter(cut.phase for cut in cuts)
    where = f" ({', '.join(f'{count} while {phase}' for phase, count in phases.items())})" if cuts else ""
    survived = Check(
        "the link was lost and nothing else",
        len(near) == len(far) == len(seconds) == wanted and not lost,
        f"{len(near)} cuts{where}, resumed after {min(seconds, default=0)} to {max(seconds, default=0)} s; "
        f"{sum(outage.again for outage in near + far):,} bytes sent again, {lost} lost",
    )
    return [once, survived]
