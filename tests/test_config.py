"""The configuration file: what it means, and what is said about a wrong one."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path
from textwrap import dedent
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from relaymux.certificates import make_certificates
from relaymux.errors import ConfigurationError
from relaymux.service import config_sections
from relaymux.service.config import (
    LIBVIRT_KEYS,
    LINK_KEYS,
    RELAY_KEYS,
    SERVICE_KEYS,
    VM_KEYS,
    Configuration,
    LinkSection,
    ServiceSection,
    check_configuration,
    load_configuration,
    read_configuration,
)
from relaymux.service.config_sections import DirectoryToMake
from relaymux.service.config_values import format_size

PROJECT = Path(__file__).parent.parent
KIB = 1024
MIB = 1024 * KIB

COMPLETE = """
    ; a comment
    [relay]
    name = hv-a
    memory = 2G
    drain-timeout = 12.5
    progress = 0
    status = run/status.sock
    runtime-directory = run

    # another one
    [link hv-b]
    transport = tls
    connect = hv-b.example:16515, [2001:db8::1]:16515    ; two ways
    certificate = pki/hv-a.pem
    private-key = pki/hv-a.key
    ca = pki/ca.pem
    peer = hv-b.example
    window = 8M                                          # bytes
    replay-buffer = 1g
    max-streams = 100
    silence = 7.5

    [disk vda]
    link = hv-b
    listen = /run/relaymux/web1/vda.sock
    mode = 0660
    owner = 65534
    group = root
    open-timeout = 3
    max-connections = 5

    [stream ram]
    link = hv-b
    connect = qemu/ram.sock
    """

SMALLEST = """
    [relay]
    name = a
    [link b]
    transport = unix
    connect = b.sock
    """


class ConfigTestCase(SynchronousTestCase):
    """Has a directory with a short path for the file and its sockets."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.file = self.directory / "relay.ini"

    def write(self, text: str) -> Path:
        self.file.write_text(dedent(text))
        return self.file

    def load(self, text: str) -> Configuration:
        return load_configuration(self.write(text))

    def errors(self, text: str) -> list[str]:
        """@return: what is wrong with C{text}, without the file's name, which each error must have."""
        _, problems = read_configuration(self.write(text))
        prefix = f"{self.file}: "
        for problem in problems:
            self.assertTrue(str(problem).startswith(prefix), str(problem))
        return [str(problem).removeprefix(prefix) for problem in problems]


class ReadTests(ConfigTestCase):
    """What a right file becomes."""

    def test_everything(self) -> None:
        """Each key of each kind of section arrives in its place, with its type."""
        self.assertEqual(
            self.load(COMPLETE),
            Configuration(
                file=str(self.file),
                name="hv-a",
                memory=2048 * MIB,
                drain_timeout=12.5,
                progress=0,
                status=self.directory / "run/status.sock",
                runtime_directory=self.directory / "run",
                links=(
                    LinkSection(
                        name="hv-b",
                        transport="tls",
                        role="connect",
                        addresses=("hv-b.example:16515", "[2001:db8::1]:16515"),
                        options={
                            "certificate": "pki/hv-a.pem",
                            "private-key": "pki/hv-a.key",
                            "ca": "pki/ca.pem",
                            "peer": "hv-b.example",
                        },
                        directory=self.directory,
                        window=8 * MIB,
                        replay_buffer=1024 * MIB,
                        max_streams=100,
                        silence=7.5,
                    ),
                ),
                services=(
                    ServiceSection(
                        kind="disk",
                        name="vda",
                        link="hv-b",
                        role="listen",
                        path=Path("/run/relaymux/web1/vda.sock"),
                        mode=0o660,
                        owner=65534,
                        group=0,
                        open_timeout=3,
                        max_connections=5,
                    ),
                    ServiceSection(
                        kind="stream",
                        name="ram",
                        link="hv-b",
                        role="connect",
                        path=self.directory / "qemu/ram.sock",
                        max_connections=100,
                    ),
                ),
            ),
        )

    def test_defaults(self) -> None:
        """What a file leaves out has the documented value."""
        configuration = self.load(SMALLEST + "[disk d]\nlink = b\nlisten = d.sock\n")
        self.assertEqual((configuration.memory, configuration.drain_timeout), (512 * MIB, 30))
        self.assertIsNone(configuration.runtime_directory)
        (link,) = configuration.links
        self.assertEqual((link.window, link.replay_buffer), (256 * KIB, 4 * MIB))
        self.assertEqual((link.max_streams, link.silence), (256, 15))
        (disk,) = configuration.services
        self.assertEqual((disk.mode, disk.owner, disk.group), (0o600, None, None))
        self.assertEqual((disk.open_timeout, disk.max_connections), (10, 128))

    def test_settings_of_each_address(self) -> None:
        """A transport is told each address apart, its own keys alone, and where files are."""
        (link,) = self.load(COMPLETE).links
        first, second = link.settings()
        self.assertEqual((first.address, second.address), link.addresses)
        self.assertEqual(set(first.options), {"certificate", "private-key", "ca", "peer"})
        self.assertEqual(first.path("ca"), self.directory / "pki/ca.pem")

    def test_relative_file_name(self) -> None:
        """Paths start at the file's directory, wherever the daemon goes after reading it."""
        self.write(SMALLEST + "[disk d]\nlink = b\nlisten = ./x/../d.sock\n")
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.directory)
        configuration = load_configuration("relay.ini")
        self.assertEqual(configuration.file, "relay.ini")
        self.assertEqual(configuration.services[0].path, self.directory / "d.sock")
        self.assertEqual(configuration.links[0].directory, self.directory)

    def test_sections_in_any_order(self) -> None:
        """A service may stand before its link and both before [relay]; a header may have more spaces."""
        configuration = self.load(
            """
            [disk  d]
            link = b
            listen = d.sock
            [ link b ]
            transport = unix
            listen = b.sock
            [relay]
            name = a
            """
        )
        self.assertEqual(configuration.services[0].section, "disk d")
        self.assertEqual(configuration.links[0].section, "link b")

    def test_disks_may_share_the_socket_that_qemu_listens_on(self) -> None:
        """QEMU has one NBD server for all disks: several sections with connect may name one path."""
        configuration = self.load(
            SMALLEST + "[disk c]\nlink = b\nconnect = nbd.sock\n" + "[disk d]\nlink = b\nconnect = nbd.sock\n"
        )
        self.assertEqual(configuration.services[0].path, configuration.services[1].path)

    def test_relaying_onwards(self) -> None:
        """What one link's service connects to may be what another one's makes: a host between two others."""
        text = SMALLEST + "[link c]\ntransport = unix\nconnect = c.sock\n"
        text += "[disk in]\nlink = b\nconnect = x.sock\n[disk out]\nlink = c\nlisten = x.sock\n"
        self.assertEqual(len(self.load(text).services), 2)

    def test_sizes(self) -> None:
        """Sizes are plain bytes or have a binary unit, small or capital."""
        for text, size in (
            ("16384", 16384),
            ("16K", 16384),
            ("1m", MIB),
            ("32 M", 32 * MIB),
            ("0032M", 32 * MIB),
        ):
            (link,) = self.load(SMALLEST + f"window = {text}\n").links
            self.assertEqual(link.window, size)

    def test_sizes_are_shown_as_they_are_written(self) -> None:
        """The largest unit that divides a size is used."""
        for size, text in ((0, "0"), (1000, "1000"), (16 * KIB, "16K"), (4 * MIB, "4M"), (1024 * MIB, "1G")):
            self.assertEqual(format_size(size), text)

    def test_windows_text(self) -> None:
        """A byte order mark and CRLF, as some editors write them, do no harm."""
        self.file.write_bytes(b"\xef\xbb\xbf" + dedent(SMALLEST).replace("\n", "\r\n").encode())
        self.assertEqual(load_configuration(self.file).links[0].addresses, ("b.sock",))

    def test_directories_to_make(self) -> None:
        """The runtime directory and those of sockets below it, parents first, and no others."""
        configuration = self.load(
            """
            [relay]
            name = a
            runtime-directory = run
            [link b]
            transport = unix
            connect = b.sock
            [disk c]
            link = b
            listen = run/web1/disks/c.sock
            [disk d]
            link = b
            connect = run/web2/d.sock
            [disk e]
            link = b
            listen = running/e.sock
            """
        )
        run = self.directory / "run"
        self.assertEqual(
            configuration.directories_to_make(),
            tuple(map(DirectoryToMake, (run, run / "web1", run / "web1/disks"))),
        )


class FormErrorTests(ConfigTestCase):
    """Files that are not even INI; the line is named."""

    def test_unreadable(self) -> None:
        """The reason is the system's."""
        for name, reason in (("missing.ini", "No such file or directory"), ("", "Is a directory")):
            file = self.directory / name
            with self.assertRaises(ConfigurationError) as caught:
                load_configuration(file)
            self.assertEqual(
                str(caught.exception),
                f"{file}: the file cannot be read: {reason}; "
                "expected a configuration file that this user may read",
            )

    def test_not_utf8(self) -> None:
        """The first line that is not text is named."""
        self.file.write_bytes(b"[relay]\n# fine\nname = \xff\xfe\n")
        with self.assertRaises(ConfigurationError) as caught:
            load_configuration(self.file)
        self.assertIn("line 3 is not UTF-8 text: it has the byte 0xff", str(caught.exception))

    def test_key_outside_sections(self) -> None:
        """A file that begins with a key lacks a header."""
        self.assertEqual(
            self.errors("# first\nname = a\n"),
            [
                "line 2 stands before the first section; found 'name = a'; "
                "expected a section such as [relay] above it"
            ],
        )

    def test_neither_section_nor_key(self) -> None:
        """All such lines of a file are named."""
        expected = "expected [SECTION], KEY = VALUE, or a comment that begins with # or ;"
        self.assertEqual(
            self.errors("[relay]\nname: a\n[link b\ntransport = unix\n"),
            [
                f"line 2 is neither a section nor a key with its value; found 'name: a'; {expected}",
                f"line 3 is neither a section nor a key with its value; found '[link b'; {expected}",
            ],
        )

    def test_section_twice(self) -> None:
        """Both places are named."""
        self.assertEqual(
            self.errors("[relay]\nname = a\n[link b]\n[disk d]\n[link b]\n"),
            [
                "[link b]: the section comes twice, in line 3 and in line 5; "
                "expected one section of a kind and name; join the two or rename one"
            ],
        )

    def test_section_twice_with_other_spaces(self) -> None:
        """Spaces do not make another section."""
        (error,) = self.errors(SMALLEST + "[link  b]\ntransport = unix\nconnect = c.sock\n")
        self.assertIn("[link b]: the section comes twice", error)

    def test_key_twice(self) -> None:
        """The second place is named."""
        self.assertEqual(
            self.errors("[relay]\nname = a\nname = b\n"),
            ["[relay]: name: the key comes a second time in line 3; expected every key once in a section"],
        )

    def test_indented_key(self) -> None:
        """A key that is indented by mistake does not silently become part of the value above it."""
        (error,) = self.errors(SMALLEST.replace("connect = b.sock", "connect = b.sock\n      silence = 5"))
        self.assertIn("[link b]: connect: an indented line below it goes on with the value", error)
        self.assertIn("found 'silence = 5'", error)

    def test_no_value(self) -> None:
        """A key with nothing behind it is not the default."""
        self.assertEqual(
            self.errors(SMALLEST + "window =   ; nothing\n"),
            ["[link b]: window: the key has no value; expected one; without the line the default holds"],
        )

    @settings(deadline=None, max_examples=200)
    @given(
        st.lists(
            st.sampled_from(
                [
                    "[relay]",
                    "[link b]",
                    "[disk d]",
                    "[",
                    "]",
                    "\n",
                    " ",
                    "=",
                    "name",
                    "transport",
                    "unix",
                    "listen",
                ]
            )
            | st.text(max_size=8)
        )
    )
    def test_anything(self, parts: list[str]) -> None:
        """Whatever the file says, the answer is a configuration or errors, no other exception."""
        directory = Path(tempfile.mkdtemp(prefix="rmx"))
        try:
            file = directory / "f.ini"
            file.write_text("".join(parts), errors="surrogatepass")
            configuration, problems = read_configuration(file)
            self.assertEqual(configuration is None, bool(problems))
            for problem in problems:
                self.assertIn(str(file), str(problem))
        finally:
            shutil.rmtree(directory)


class SectionErrorTests(ConfigTestCase):
    """Sections and keys that are missing, unknown or in the wrong place."""

    def test_empty(self) -> None:
        """An empty file lacks both sections that there must be."""
        self.assertEqual(
            self.errors(""),
            [
                "there is no [relay] section; expected one, with a line name = NAME: the name of this daemon",
                "there is no [link NAME] section; expected at least one, which says how to reach the peer",
            ],
        )

    def test_unknown_kind(self) -> None:
        """A misspelt kind is suggested right; there is no [DEFAULT] as in other INI files."""
        expected = "; expected [relay], [link NAME], [disk NAME], [stream NAME], [libvirt] or [vm NAME]"
        self.assertEqual(
            self.errors(SMALLEST + "[disc d]\nlink = b\n"),
            ["[disc d]: there is no such kind of section; did you mean 'disk'?" + expected],
        )
        self.assertEqual(
            self.errors(SMALLEST + "[DEFAULT]\nlink = b\n"),
            ["[DEFAULT]: there is no such kind of section" + expected],
        )

    def test_names_of_sections(self) -> None:
        """Every kind but [relay] has a name, of the characters that can go on the wire."""
        self.assertEqual(
            self.errors(SMALLEST + "[disk]\n"), ["[disk]: the section has no name; expected [disk NAME]"]
        )
        self.assertEqual(
            self.errors(SMALLEST.replace("[relay]", "[relay x]")),
            ["[relay x]: this kind of section has no name; expected [relay]"],
        )
        for name in ("a b", "web1/vda", "ä", "x" * 65):
            (error,) = self.errors(SMALLEST + f"[disk {name}]\nlink = b\nlisten = d.sock\n")
            self.assertEqual(
                error,
                f"[disk {name}]: this is not a name; found {name!r}; "
                "expected 1 to 64 of the characters A-Z a-z 0-9 . _ -",
            )

    def test_no_name(self) -> None:
        """The daemon must be given a name."""
        (error,) = self.errors(SMALLEST.replace("name = a", ""))
        self.assertIn("[relay]: name: the key is missing; expected the name of this daemon", error)

    def test_unknown_keys(self) -> None:
        """A misspelt key is suggested right, for a transport's own keys too."""
        for section, key, rest in (
            (
                "relay",
                "drain-timout",
                "; did you mean 'drain-timeout'?; expected one of " + ", ".join(RELAY_KEYS),
            ),
            ("link hv-b", "windows", "; did you mean 'window'?; expected one of " + ", ".join(LINK_KEYS)),
            (
                "link hv-b",
                "certifcate",
                "; did you mean 'certificate'?; expected one of " + ", ".join(LINK_KEYS),
            ),
            ("link hv-b", "Window", "; did you mean 'window'?; expected one of " + ", ".join(LINK_KEYS)),
            ("link hv-b", "xyzzy", "; expected one of " + ", ".join(LINK_KEYS)),
            ("disk vda", "lisen", "; did you mean 'listen'?; expected one of " + ", ".join(SERVICE_KEYS)),
        ):
            (error,) = self.errors(COMPLETE.replace(f"[{section}]", f"[{section}]\n    {key} = 1"))
            self.assertTrue(error.startswith(f"[{section}]: {key}: there is no such key in "), error)
            self.assertIn(rest, error)

    def test_key_of_another_transport(self) -> None:
        """What a transport does not know is an error with it, however right it is with another."""
        (error,) = self.errors(SMALLEST + "certificate = a.pem\n")
        self.assertTrue(
            error.startswith(
                "[link b]: certificate: there is no such key in a [link] section with transport = "
            ),
            error,
        )

    def test_unknown_transport(self) -> None:
        """The installed ones are named, and the keys of the section are not judged by nobody's rules."""
        (error,) = self.errors(COMPLETE.replace("transport = tls", "transport = tsl"))
        self.assertTrue(error.startswith("[link hv-b]: transport: "), error)
        for name in ("'tsl'", "tcp", "tls", "unix"):
            self.assertIn(name, error)

    def test_no_transport(self) -> None:
        """There is no default way to reach the peer."""
        (error,) = self.errors(COMPLETE.replace("transport = tls", ""))
        self.assertEqual(
            error, "[link hv-b]: transport: the key is missing; expected the name of a transport, such as tls"
        )

    def test_connect_or_listen(self) -> None:
        """Exactly one of them, in links and in services."""
        for section, key in (("link hv-b", "connect"), ("disk vda", "listen"), ("stream ram", "connect")):
            other = "listen" if key == "connect" else "connect"
            both = self.errors(COMPLETE.replace(f"[{section}]", f"[{section}]\n    {other} = x"))
            self.assertEqual(
                both,
                [f"[{section}]: the section has both connect and listen; expected exactly one of the two"],
            )
        self.assertEqual(
            self.errors(SMALLEST.replace("connect = b.sock", "")),
            ["[link b]: the section has neither connect nor listen; expected exactly one of the two"],
        )
        self.assertEqual(
            self.errors(SMALLEST + "[disk d]\nlink = b\n"),
            ["[disk d]: the section has neither connect nor listen; expected exactly one of the two"],
        )

    def test_unknown_link(self) -> None:
        """A misspelt link is suggested right, and the links there are named."""
        self.assertEqual(
            self.errors(COMPLETE.replace("link = hv-b\n    connect", "link = hvb\n    connect")),
            [
                "[stream ram]: link: there is no section [link hvb]; did you mean 'hv-b'?; found 'hvb'; "
                "expected the name of a link, one of hv-b"
            ],
        )

    def test_no_link(self) -> None:
        """A service travels over a link that is named, even if there is only one."""
        self.assertEqual(
            self.errors(SMALLEST + "[disk d]\nlisten = d.sock\n"),
            ["[disk d]: link: the key is missing; expected the name of a [link NAME] section"],
        )

    def test_socket_keys_with_connect(self) -> None:
        """Who does not make a socket cannot say its mode."""
        for key, value in (("mode", "0600"), ("owner", "root"), ("group", "root")):
            self.assertEqual(
                self.errors(SMALLEST + f"[disk d]\nlink = b\nconnect = d.sock\n{key} = {value}\n"),
                [
                    f"[disk d]: {key}: the key says how the socket is made, and with connect it is not made "
                    f"here; expected listen, or no {key}"
                ],
            )


class ValueErrorTests(ConfigTestCase):
    """Single values that are wrong."""

    def assert_link_error(self, line: str, *parts: str) -> None:
        key, _, value = line.partition(" = ")
        (error,) = self.errors(SMALLEST + line + "\n")
        self.assertTrue(error.startswith(f"[link b]: {key}: "), error)
        for part in (f"found {value!r}", *parts):
            self.assertIn(part, error)

    def assert_disk_error(self, line: str, *parts: str) -> None:
        key, _, value = line.partition(" = ")
        listen = "" if key == "listen" else "listen = d.sock\n"
        (error,) = self.errors(SMALLEST + f"[disk d]\nlink = b\n{listen}{line}\n")
        self.assertTrue(error.startswith(f"[disk d]: {key}: "), error)
        for part in (f"found {value!r}", *parts):
            self.assertIn(part, error)

    def test_sizes(self) -> None:
        """Not a size, too small, too large."""
        expected = "expected a size from 16K to 1G, in bytes or with K, M or G behind it"
        for value in ("4MB", "-1", "1.5M", "four", "4T", "M", "9" * 16):
            self.assert_link_error(f"window = {value}", "this is not a size", expected)
        self.assert_link_error("window = 1K", "the size is too small", expected)
        self.assert_link_error("window = 2G", "the size is too large", expected)
        self.assert_link_error(
            "replay-buffer = 32K", "the size is too small", "expected a size from 64K to 1G"
        )

    def test_durations(self) -> None:
        """Not a number of seconds, too short, too long."""
        for value in ("15s", "soon", "nan", "1,5"):
            self.assert_link_error(
                f"silence = {value}", "not a duration", "expected seconds, a number from 0.5 to 3600"
            )
        for value in ("0", "-3", "0.1", "-inf"):
            self.assert_link_error(f"silence = {value}", "the duration is too short")
        for value in ("3601", "inf"):
            self.assert_link_error(f"silence = {value}", "the duration is too long")
        self.assert_disk_error("open-timeout = 0", "the duration is too short", "from 0.1 to 3600")
        (error,) = self.errors(SMALLEST.replace("name = a", "name = a\n    drain-timeout = long"))
        self.assertIn("[relay]: drain-timeout: this is not a duration; found 'long'", error)

    def test_counts(self) -> None:
        """Whole numbers in their range."""
        for value in ("0", "-1", "1.5", "many", "65537", "٣"):
            self.assert_link_error(f"max-streams = {value}", "expected a whole number from 1 to 65536")
        self.assert_disk_error("max-connections = 0", "expected a whole number from 1 to 65536")

    def test_modes(self) -> None:
        """Three octal digits."""
        for value in ("0680", "rw-------", "60", "00600", "1777", "0o600"):
            self.assert_disk_error(
                f"mode = {value}", "not a file mode", "three octal digits such as 0600 or 0660"
            )

    def test_owner_and_group(self) -> None:
        """Names must be known, numbers possible."""
        for value in ("no-such-one", "4294967295", "-1"):
            self.assert_disk_error(f"owner = {value}", "this machine has no such user", "the name of a user")
            self.assert_disk_error(
                f"group = {value}", "this machine has no such group", "the name of a group"
            )

    def test_names(self) -> None:
        """The daemon's name has the same form as the others."""
        (error,) = self.errors(SMALLEST.replace("name = a", "name = host a"))
        self.assertIn("[relay]: name: this is not a name; found 'host a'", error)

    def test_addresses(self) -> None:
        """Commas separate addresses, and nothing else."""
        (error,) = self.errors(SMALLEST.replace("b.sock", "b.sock,, c.sock"))
        self.assertIn("[link b]: connect: an address is missing; found 'b.sock,, c.sock'", error)
        (error,) = self.errors(SMALLEST.replace("b.sock", "b.sock, c.sock, b.sock"))
        self.assertIn("[link b]: connect: the same address comes twice; found 'b.sock'", error)

    def test_long_path(self) -> None:
        """What counts is the bytes of the whole path; 107 of them are still right."""
        longest = "/" + "x" * 106
        self.assertEqual(self.errors(SMALLEST + f"[disk d]\nlink = b\nlisten = {longest}\n"), [])
        self.assert_disk_error(
            f"listen = {longest}y", "the path has 108 bytes and a UNIX socket's path has room for 107"
        )
        umlauts = "/" + "ä" * 54
        self.assert_disk_error(f"listen = {umlauts}", "the path has 109 bytes")
        relative = "x" * (107 - len(os.fsencode(self.directory)))
        (error,) = self.errors(SMALLEST + f"[disk d]\nlink = b\nconnect = {relative}\n")
        self.assertIn(
            f"the path has 108 bytes and a UNIX socket's path has room for 107; found '{self.directory}",
            error,
        )

    def test_strange_paths(self) -> None:
        """Paths that would not do what their writer thinks."""
        self.assert_disk_error("listen = @relay", "an abstract socket has no permissions")
        self.assert_disk_error("listen = ~/d.sock", "this is not a usable path", "~ is not replaced")
        self.assert_disk_error("listen = /run/relaymux/", "a socket's name cannot end like this")
        self.assert_disk_error("listen = /run/d.sock~", "a socket's name cannot end like this")


class ContradictionTests(ConfigTestCase):
    """Values that are right alone and wrong together."""

    def test_window_larger_than_replay_buffer(self) -> None:
        """More than the replay buffer is never on its way, so the sizes are probably confused."""
        self.assertEqual(
            self.errors(SMALLEST + "window = 64M\nreplay-buffer = 4M\n"),
            [
                "[link b]: window: the window of one stream is larger than the replay-buffer of its link; "
                "found '64M'; expected at most 4M, or a larger replay-buffer"
            ],
        )
        self.assertEqual(self.errors(SMALLEST + "window = 64M\nreplay-buffer = 64M\n"), [])
        self.assertEqual(self.load(SMALLEST + "window = 64M\n").links[0].replay_buffer, 64 * MIB)

    def test_too_little_memory(self) -> None:
        """Every link and one connection of every section have to fit; the error says what would do."""
        text = dedent(SMALLEST) + "replay-buffer = 64M\nwindow = 8M\n[disk d]\nlink = b\nlisten = d.sock\n"
        self.assertEqual(
            self.errors(text.replace("name = a", "name = a\nmemory = 64M")),
            [
                "[relay]: memory: 1 links and 1 services, with their sizes, need more to begin with; "
                "found '64M'; expected at least 74M, or a smaller replay-buffer or window"
            ],
        )
        self.assertEqual(self.errors(text.replace("name = a", "name = a\nmemory = 74M")), [])

    def test_more_connections_than_streams(self) -> None:
        """A section cannot have what its link does not carry; the default adapts itself."""
        text = SMALLEST + "max-streams = 8\n[disk d]\nlink = b\nlisten = d.sock\n"
        self.assertEqual(self.load(text).services[0].max_connections, 8)
        self.assertEqual(
            self.errors(text + "max-connections = 9\n"),
            [
                "[disk d]: max-connections: the link carries fewer streams: [link b] has max-streams = 8; "
                "found '9'; expected at most 8, or a larger max-streams"
            ],
        )

    def test_name_in_both_kinds(self) -> None:
        """On the wire there is only the name."""
        self.assertEqual(
            self.errors(
                SMALLEST + "[disk x]\nlink = b\nlisten = d.sock\n[stream x]\nlink = b\nlisten = e.sock\n"
            ),
            [
                "[stream x]: the name is taken by [disk x]; disks and streams share one set of names; "
                "expected another name, on both sides of the link"
            ],
        )

    def test_two_sections_make_one_socket(self) -> None:
        """However the path is written."""
        (error,) = self.errors(
            SMALLEST + "[disk c]\nlink = b\nlisten = s.sock\n[disk d]\nlink = b\nlisten = x/../s.sock\n"
        )
        self.assertEqual(
            error,
            f"[disk d]: listen: [disk c] makes the same socket; found '{self.directory}/s.sock'; "
            "expected a path of its own for each section",
        )

    def test_peer_connected_to_itself(self) -> None:
        """A path copied from listen to connect would send the peer its own bytes."""
        (error,) = self.errors(
            SMALLEST + "[disk c]\nlink = b\nlisten = s.sock\n[disk d]\nlink = b\nconnect = s.sock\n"
        )
        self.assertIn("[disk d]: connect: [disk c] says listen for the same path", error)

    def test_links_on_one_address(self) -> None:
        """Two links cannot listen at one place; they may dial one."""
        text = SMALLEST.replace("connect", "listen") + "[link c]\ntransport = unix\nlisten = c.sock, b.sock\n"
        self.assertEqual(
            self.errors(text),
            [
                "[link c]: listen: [link b] listens there already; found 'b.sock'; "
                "expected another address: a link listens for one peer"
            ],
        )
        self.assertEqual(self.errors(text.replace("listen", "connect")), [])

    def test_all_errors(self) -> None:
        """Every mistake of a file is found in one reading, and the first one is what is raised."""
        text = """
            [relay]
            name = a b
            [link b]
            transport = unix
            connect = b.sock
            window = 1
            silense = 3
            [disk d]
            link = c
            listen = d.sock
            mode = 9
            """
        errors = self.errors(text)
        self.assertEqual(
            sorted(
                error.partition(": ")[0] + error.partition(": ")[2].partition(": ")[0] for error in errors
            ),
            ["[disk d]link", "[disk d]mode", "[link b]silense", "[link b]window", "[relay]name"],
        )
        with self.assertRaises(ConfigurationError) as caught:
            load_configuration(self.file)
        self.assertEqual(str(caught.exception), f"{self.file}: {errors[0]}")


class CheckTests(ConfigTestCase):
    """A right file on a machine that is not ready for it."""

    def check(self, text: str) -> list[str]:
        problems = check_configuration(self.load(text), Clock())
        return [str(problem).removeprefix(f"{self.file}: ") for problem in problems]

    def check_listen(self, path: str) -> str:
        (error,) = self.check(SMALLEST + f"[disk d]\nlink = b\nlisten = {path}\n")
        prefix = "[disk d]: listen: "
        self.assertTrue(error.startswith(prefix), error)
        return error.removeprefix(prefix)

    def be_user(self, user: int) -> None:
        for name, value in (("geteuid", user), ("getegid", user), ("getgroups", [user])):
            patcher = mock.patch(f"os.{name}", return_value=value)
            patcher.start()
            self.addCleanup(patcher.stop)

    def test_fine(self) -> None:
        """Nothing is said about what is right, and nothing is made."""
        before = sorted(self.directory.iterdir())
        text = SMALLEST.replace("name = a", "name = a\n    runtime-directory = run")
        self.assertEqual(self.check(text + "[disk d]\nlink = b\nlisten = run/web1/d.sock\n"), [])
        self.assertEqual(self.check(SMALLEST + "[disk d]\nlink = b\nlisten = d.sock\n"), [])
        self.assertEqual(sorted(self.directory.iterdir()), [*before, self.file])

    def test_missing_directory(self) -> None:
        """The operator is told how to make it."""
        error = self.check_listen("web1/d.sock")
        self.assertTrue(error.startswith(f"the directory {self.directory}/web1 does not exist; found"), error)
        self.assertIn(f"install -d -m 0700 {self.directory}/web1", error)

    def test_directory_is_none(self) -> None:
        """A file where the directory should be."""
        (self.directory / "web1").touch()
        self.assertIn(f"{self.directory}/web1 is not a directory", self.check_listen("web1/d.sock"))

    def test_directory_for_everyone(self) -> None:
        """A directory in which anyone may replace files is no place for a socket; /tmp's kind is."""
        shared = self.directory / "shared"
        shared.mkdir()
        shared.chmod(0o777)
        self.assertIn("everyone on this machine may replace files", self.check_listen("shared/d.sock"))
        shared.chmod(0o1777)
        self.assertEqual(self.check(SMALLEST + "[disk d]\nlink = b\nlisten = shared/d.sock\n"), [])

    def test_directory_without_permission(self) -> None:
        """The user who would need the permission is named."""
        with mock.patch("os.access", return_value=False):
            error = self.check_listen("d.sock")
        self.assertIn(f"the user with id {os.geteuid()} may not make files in {self.directory}", error)

    def test_something_else_in_the_way(self) -> None:
        """A file or a link is not replaced; a socket is the daemon's to judge."""
        (self.directory / "file").touch()
        (self.directory / "link").symlink_to("nowhere")
        for name in ("file", "link"):
            self.assertIn("something that is not a socket is there", self.check_listen(name))
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(self.directory / "d.sock"))
            self.assertEqual(self.check(SMALLEST + "[disk d]\nlink = b\nlisten = d.sock\n"), [])

    def test_runtime_directory(self) -> None:
        """Only its last part is made, in a place where that is possible."""
        text = SMALLEST.replace("name = a", "name = a\n    runtime-directory = {}")
        (error,) = self.check(text.format("x/run"))
        self.assertIn(f"[relay]: runtime-directory: the directory {self.directory}/x does not exist", error)
        (error,) = self.check(text.format("relay.ini"))
        self.assertIn("[relay]: runtime-directory: this is not a directory", error)
        with mock.patch("os.access", return_value=False):
            (error,) = self.check(text.format("run"))
        self.assertIn("may not make a directory in", error)

    def test_status_socket(self) -> None:
        """It needs a place as others do, which may be one that the daemon makes, and is not theirs."""
        text = SMALLEST.replace("name = a", "name = a\n    status = {}")
        (error,) = self.check(text.format("x/status.sock"))
        self.assertIn(f"[relay]: status: the directory {self.directory}/x does not exist", error)
        run = "run/status.sock\n    runtime-directory = run"
        self.assertEqual(self.check(text.format(run)), [])
        self.file.write_text(dedent(text.format("d.sock") + "[disk d]\nlink = b\nlisten = d.sock\n"))
        _, (problem,) = read_configuration(self.file)
        self.assertIn("[relay]: status: [disk d] has the same socket", str(problem))

    def test_giving_sockets_away(self) -> None:
        """Only root gives files to others, and groups are one's own."""
        text = SMALLEST + "[disk d]\nlink = b\nlisten = d.sock\nowner = 12345\ngroup = 23456\n"
        self.be_user(0)
        self.assertEqual(self.check(text), [])
        self.be_user(12345)
        (error,) = self.check(text)
        self.assertIn("[disk d]: group: the user with id 12345 is not in this group; found '23456'", error)
        self.be_user(23456)
        (error,) = self.check(text)
        self.assertIn("[disk d]: owner: the user with id 23456 cannot give files to another one", error)

    def test_transport_looks_at_its_keys(self) -> None:
        """What a transport finds wrong is said with file, section and key, once for all addresses."""
        text = COMPLETE[: COMPLETE.index("[disk")]
        errors = self.check(text)
        self.assertEqual(len(errors), 1, errors)
        self.assertTrue(errors[0].startswith("[link hv-b]: "), errors)
        self.assertIn("pki/", errors[0])

    def test_each_address(self) -> None:
        """Every address is looked at by the transport."""
        errors = self.check(
            "[relay]\nname = a\n[link b]\ntransport = tcp\nconnect = 127.0.0.1:1, nonsense, 127.0.0.1:x\n"
        )
        self.assertEqual(len(errors), 2, errors)
        for error, found in zip(errors, ("nonsense", "127.0.0.1:x"), strict=True):
            self.assertTrue(error.startswith("[link b]: connect: "), error)
            self.assertIn(found, error)


class ExampleTests(ConfigTestCase):
    """The files in etc/ are right as they are."""

    def setUp(self) -> None:
        super().setUp()
        for file in (PROJECT / "etc").glob("*.ini"):
            shutil.copy(file, self.directory)

    def check(self, name: str) -> Configuration:
        configuration = load_configuration(self.directory / name)
        self.assertEqual([str(p) for p in check_configuration(configuration, Clock())], [])
        return configuration

    def assert_fit(self, first: Configuration, second: Configuration) -> None:
        """Each service has one side that listens and one that connects, the links as well."""
        names = [{(s.kind, s.name) for s in side.services} for side in (first, second)]
        self.assertEqual(*names)
        self.assertNotEqual(first.name, second.name)
        roles = {service.name: service.role for service in first.services}
        for service in second.services:
            self.assertNotEqual(service.role, roles[service.name])
        (one,), (other,) = first.links, second.links
        self.assertEqual((one.addresses, one.transport), (other.addresses, other.transport))
        self.assertEqual({one.role, other.role}, {"connect", "listen"})

    def test_one_machine(self) -> None:
        """relay.ini and its peer need nothing but themselves."""
        self.assert_fit(self.check("relay.ini"), self.check("relay-peer.ini"))

    def test_two_hosts(self) -> None:
        """source.ini and destination.ini need the certificates that their comments say how to make."""
        source = (self.directory / "source.ini").read_text()
        self.assertIn("relaymux make-certificates etc/pki hv-a.example hv-b.example", source)
        make_certificates(self.directory / "pki", ["hv-a.example", "hv-b.example"])
        self.assert_fit(self.check("source.ini"), self.check("destination.ini"))


class DocumentationTests(SynchronousTestCase):
    """docs/configuration.md tells all keys and the real defaults."""

    def test_keys_and_defaults(self) -> None:
        """Each key has a row in a table, with its default."""
        rows = {}
        for line in (PROJECT / "docs/configuration.md").read_text().splitlines():
            cells = [cell.strip(" `") for cell in line.split("|")]
            if len(cells) > 4:
                rows[cells[1]] = cells[3]
        sizes = {
            "memory": config_sections.DEFAULT_MEMORY,
            "window": config_sections.DEFAULT_WINDOW,
            "replay-buffer": config_sections.DEFAULT_REPLAY_BUFFER,
        }
        numbers = {
            "drain-timeout": config_sections.DEFAULT_DRAIN_TIMEOUT,
            "progress": config_sections.DEFAULT_PROGRESS,
            "max-streams": config_sections.DEFAULT_MAX_STREAMS,
            "silence": config_sections.DEFAULT_SILENCE,
            "open-timeout": config_sections.DEFAULT_OPEN_TIMEOUT,
            "max-connections": config_sections.DEFAULT_MAX_CONNECTIONS,
        }
        for key in {*RELAY_KEYS, *LINK_KEYS, *SERVICE_KEYS, *LIBVIRT_KEYS, *VM_KEYS}:
            self.assertIn(key, rows)
            if key in sizes:
                self.assertEqual(rows[key], format_size(sizes[key]), key)
            elif key in numbers:
                self.assertEqual(rows[key], f"{numbers[key]:g}", key)
        self.assertEqual(rows["mode"], f"{config_sections.DEFAULT_MODE:04o}")
