"""A minute assembler: it knows labels and distances, and leaves the instructions to the listing."""

from __future__ import annotations

import re

__all__ = ["assemble"]

_ITEM = re.compile(
    r"(?P<text>'[^']*')|(?P<byte>[0-9A-F]{2})\b|\$(?P<value>\w+):(?P<size>\d)"
    r"|(?P<mode>@|>>|>)(?P<label>\w+)"
)


def assemble(listing: str, values: dict[str, int], origin: int) -> bytes:
    """
    Turn a listing into machine code.

    A line is an optional C{label:}, bytes in hexadecimal, and a comment behind
    a semicolon.  Among the bytes C{$name:n} is a value in n bytes, C{'text'}
    its ASCII bytes, C{@label} a 16-bit address, C{>label} an 8-bit and
    C{>>label} a 16-bit distance.

    @param values: what the C{$name:n} stand for; taken modulo the room.
    @param origin: the address of the first byte.
    @raise ValueError: an unknown word, or a jump that does not reach.
    """
    code = bytearray()
    labels: dict[str, int] = {}
    holes: list[tuple[int, str, str]] = []
    for line in listing.splitlines():
        text = line.partition(";")[0]
        label, colon, rest = text.partition(":")
        if colon and re.fullmatch(r"\w+", label):
            labels[label] = origin + len(code)
            text = rest
        place = 0
        for item in _ITEM.finditer(text):
            if text[place : item.start()].strip():
                break
            place = item.end()
            if item["text"]:
                code += item["text"][1:-1].encode("ascii")
            elif item["byte"]:
                code.append(int(item["byte"], 16))
            elif item["value"]:
                size = int(item["size"])
                code += (values[item["value"]] % (1 << 8 * size)).to_bytes(size, "little")
            else:
                holes.append((len(code), item["mode"], item["label"]))
                code += bytes(1 if item["mode"] == ">" else 2)
        if text[place:].strip():
            raise ValueError(f"cannot read {text[place:].strip()!r} in {line.strip()!r}")
    for offset, mode, label in holes:
        size = 1 if mode == ">" else 2
        value = labels[label]
        if mode != "@":
            value -= origin + offset + size
            if not -(1 << 8 * size - 1) <= value < 1 << 8 * size - 1:
                raise ValueError(f"{label} is {value} bytes away, too far for {mode!r}")
        code[offset : offset + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(code)
