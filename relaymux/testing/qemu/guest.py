"""
The guest that is migrated: one boot sector that never stops checking itself.

Every page of a memory region, and every block of an area on some disks, holds
a pattern that follows from one counter.  Each tick the guest takes the next
pages and the next block of each disk, verifies that they hold what the
previous lap wrote, overwrites them with the next pattern, and prints one line
on the first serial port::

    tick 00000123 ok

So it notices a corrupt page, one at the wrong place, and above all a stale
one: a write that a migration lost.  It then prints C{BAD} with the address
behind it, what it found and what it expected, and halts.  The destination's first byte of
console output continues the line where the source's last one broke off.

It runs in real mode, where the BIOS reads and writes the disks, with a data
segment of 4 GiB (entered through protected mode) to reach all memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from relaymux.testing.qemu.assemble import assemble

__all__ = ["PAGE_BYTES", "SECTOR_BYTES", "GuestSettings", "boot_sector"]

PAGE_BYTES = 4096
SECTOR_BYTES = 512

#: Where the BIOS loads a boot sector.
_ORIGIN = 0x7C00

#: Input clock of the interval timer, Hz.
_TIMER_HZ = 1193182

#: A pattern's first word is C{counter * _MULTIPLIER}, each further one adds
#: C{_STRIDE}.  Both are odd, so two counters below 2**32 never share a pattern.
_MULTIPLIER = 0x9E3779B1
_STRIDE = 0x85EBCA77


@dataclass(frozen=True)
class GuestSettings:
    """
    What the guest does.

    @ivar memory: the machine's memory in MiB; the region is all but the first
        16 MiB and the last 8 MiB, where the firmware keeps its own data.
    @ivar pages_per_tick: pages verified and dirtied per tick; the default of
        75 makes 15,000 pages (59 MiB) per second.
    @ivar ticks_per_second: 19 to 1000, the interval timer's range.
    @ivar drives: BIOS numbers of the disks it writes to (0x80 is the first),
        at most four.
    @ivar first_sector: where the area it writes starts on each of them.
    @ivar blocks: how many blocks that area has.
    @ivar sectors_per_block: 1 to 127.
    """

    memory: int = 128
    pages_per_tick: int = 75
    ticks_per_second: int = 200
    drives: tuple[int, ...] = ()
    first_sector: int = 2048
    blocks: int = 256
    sectors_per_block: int = 16

    @property
    def region_start(self) -> int:
        """Physical address of the first page."""
        return 16 << 20

    @property
    def pages(self) -> int:
        """How many pages the region has."""
        return ((self.memory - 8 << 20) - self.region_start) // PAGE_BYTES

    @property
    def lap_ticks(self) -> int:
        """Ticks after which every page and every block was verified once."""
        return max(-(-self.pages // self.pages_per_tick), self.blocks if self.drives else 0)


#: In L{assemble}'s form: each instruction's bytes, then what they say.
#: ebp counts pages, edi is the next page, ebx the stride, edx a drive's number.
_LISTING = """
start:  FA                          ; cli
        FC                          ; cld
        31 C0                       ; xor ax, ax
        8E D8                       ; mov ds, ax
        8E D0                       ; mov ss, ax
        BC 00 7C                    ; mov sp, 0x7c00
        0F 01 16 @gdt               ; lgdt [gdt]
        B0 34                       ; mov al, 0x34      timer 0, rate generator
        E6 43                       ; out 0x43, al
        B8 $period:2                ; mov ax, period
        E6 40                       ; out 0x40, al
        88 E0                       ; mov al, ah
        E6 40                       ; out 0x40, al
        66 31 ED                    ; xor ebp, ebp
        66 31 D2                    ; xor edx, edx
        66 BF $region:4             ; mov edi, region
        66 BB $stride:4             ; mov ebx, stride
        E8 >>flat                   ; call flat

tick:   BE $per_tick:2              ; mov si, pages per tick
page:   B9 00 04                    ; mov cx, 1024      words in a page
        66 69 C5 $multiplier:4      ; imul eax, ebp, multiplier
        66 81 FD $pages:4           ; cmp ebp, pages    first lap: nothing to verify
        72 >store                   ; jb store
        66 57                       ; push edi
        66 2D $page_lap:4           ; sub eax, pages * multiplier
        E8 >>verify                 ; call verify
        66 5F                       ; pop edi
        B5 04                       ; mov ch, 4         cx = 1024 again
        66 69 C5 $multiplier:4      ; imul eax, ebp, multiplier
store:  E8 >>fill                   ; call fill
        66 45                       ; inc ebp
        66 81 FF $region_end:4      ; cmp edi, region end
        72 >next                    ; jb next
        66 BF $region:4             ; mov edi, region
next:   66 81 FD $pages:4           ; cmp ebp, pages    the first lap goes on without ticks
        72 >page                    ; jb page
        4E                          ; dec si
        75 >page                    ; jnz page

        66 57                       ; push edi
        BE @drives                  ; mov si, drives
drive:  AC                          ; lodsb
        84 C0                       ; test al, al
        74 >done                    ; jz done
        88 C2                       ; mov dl, al
        66 A1 @count                ; mov eax, [count]
        66 3D $blocks:4             ; cmp eax, blocks   first lap: nothing to verify
        72 >stamp                   ; jb stamp
        B4 42                       ; mov ah, 0x42      extended read
        E8 >>disk                   ; call disk
        E8 >>block                  ; call block
        66 2D $block_lap:4          ; sub eax, blocks * multiplier
        E8 >>verify                 ; call verify
stamp:  E8 >>block                  ; call block
        E8 >>fill                   ; call fill
        B4 43                       ; mov ah, 0x43      extended write
        E8 >>disk                   ; call disk
        EB >drive                   ; jmp drive
done:   66 5F                       ; pop edi
        66 FF 06 @count             ; inc dword [count]
        66 83 06 @sector $sectors:1 ; add dword [sector], sectors per block
        66 81 3E @sector $last:4    ; cmp dword [sector], end of the area
        72 >sleep                   ; jb sleep
        66 C7 06 @sector $first:4   ; mov dword [sector], start of the area

sleep:  FB                          ; sti
        F4                          ; hlt               until the timer's next interrupt
        FA                          ; cli
        BE @units                   ; mov si, last digit
digit:  FE 04                       ; inc byte [si]
        80 3C 3A                    ; cmp byte [si], ':'
        72 >say                     ; jb say
        C6 04 30                    ; mov byte [si], '0'
        4E                          ; dec si
        EB >digit                   ; jmp digit
say:    BE @line                    ; mov si, line
        E8 >>print                  ; call print
        E9 >>tick                   ; jmp tick

; eax = first word, cx = words, edi = buffer of the current block on drive dl
block:  66 69 06 @count $multiplier:4 ; imul eax, [count], multiplier
        66 01 D0                    ; add eax, edx
        B9 $words:2                 ; mov cx, words in a block
        66 BF 00 00 01 00           ; mov edi, 0x10000
        C3                          ; ret

verify: 67 66 AF                    ; scasd             [edi] against eax
        75 >bad                     ; jne bad
        66 01 D8                    ; add eax, ebx
        E2 >verify                  ; loop verify
        C3                          ; ret

fill:   67 66 AB                    ; stosd             eax to [edi]
        66 01 D8                    ; add eax, ebx
        E2 >fill                    ; loop fill
        C3                          ; ret

; ah = 0x42 or 0x43, dl = drive
disk:   66 60                       ; pushad
        BE @packet                  ; mov si, packet
        C6 44 02 $sectors:1         ; mov byte [si + 2], sectors    the BIOS changes it
        B0 00                       ; mov al, 0
        CD 13                       ; int 0x13
        73 >back                    ; jnc back
        66 50                       ; push eax          its status comes first
        BE @io                      ; mov si, io
        EB >report                  ; jmp report
back:   E8 >>flat                   ; call flat         the BIOS may have undone it
        66 61                       ; popad
        C3                          ; ret

; give es a limit of 4 GiB
flat:   0F 20 C0                    ; mov eax, cr0
        40                          ; inc ax            protected mode
        0F 22 C0                    ; mov cr0, eax
        6A 08                       ; push 8
        07                          ; pop es
        48                          ; dec ax            real mode
        0F 22 C0                    ; mov cr0, eax
        6A 00                       ; push 0
        07                          ; pop es
        C3                          ; ret

bad:    66 50                       ; push eax          expected
        67 66 26 FF 77 FC           ; push dword [es:edi - 4]       found
        66 57                       ; push edi          just behind it
        BE @ram                     ; mov si, ram
        66 81 FF $region:4          ; cmp edi, region
        77 >report                  ; ja report
        BE @store_name              ; mov si, disk
report: E8 >>print                  ; call print
        B2 03                       ; mov dl, 3         three numbers
number: 66 58                       ; pop eax
        B9 08 00                    ; mov cx, 8
nibble: 66 C1 C0 04                 ; rol eax, 4
        50                          ; push ax
        24 0F                       ; and al, 15
        3C 0A                       ; cmp al, 10
        1C 69                       ; sbb al, 0x69
        2F                          ; das               '0'-'9', 'A'-'F'
        E8 >>putc                   ; call putc
        58                          ; pop ax
        E2 >nibble                  ; loop nibble
        B0 20                       ; mov al, ' '
        E8 >>putc                   ; call putc
        FE CA                       ; dec dl
        75 >number                  ; jnz number
halt:   F4                          ; hlt
        EB >halt                    ; jmp halt

print:  AC                          ; lodsb
        84 C0                       ; test al, al
        74 >end                     ; jz end
        E8 >>putc                   ; call putc
        EB >print                   ; jmp print
putc:   52                          ; push dx
        50                          ; push ax
        BA FD 03                    ; mov dx, 0x3fd
full:   EC                          ; in al, dx
        A8 20                       ; test al, 0x20     room for a byte
        74 >full                    ; jz full
        58                          ; pop ax
        B2 F8                       ; mov dl, 0xf8
        EE                          ; out dx, al
        5A                          ; pop dx
end:    C3                          ; ret

line:   'tick ' 30 30 30 30 30 30 30
units:  30 ' ok' 0D 0A 00
ram:    'BAD page ' 00
store_name: 'BAD disk ' 00
io:     'BAD io ' 00
gdt:    0F 00 @gdt 00 00 00 00      ; the null descriptor's room: limit and place of the table
        FF FF 00 00 00 92 CF 00     ; data, base 0, 4 GiB
packet: 10 00 00 00 00 00 00 10     ; sectors, buffer 1000:0000
sector: $first:4 00 00 00 00
count:  00 00 00 00
drives: $drives:4 00
"""


def boot_sector(settings: GuestSettings) -> bytes:
    """
    @return: the 512 bytes a disk to boot from starts with.
    @raise ValueError: the settings are out of range.
    """
    if not 19 <= settings.ticks_per_second <= 1000:
        raise ValueError(f"{settings.ticks_per_second} ticks per second; possible are 19 to 1000")
    if not 1 <= settings.sectors_per_block <= 127 or len(settings.drives) > 4:
        raise ValueError("a block has 1 to 127 sectors, and at most four disks are written")
    if settings.pages < 1 or not 1 <= settings.pages_per_tick < 1 << 16 or settings.blocks < 1:
        raise ValueError("there must be at least one page, one page per tick and one block")
    code = assemble(
        _LISTING,
        {
            "period": _TIMER_HZ // settings.ticks_per_second,
            "region": settings.region_start,
            "region_end": settings.region_start + settings.pages * PAGE_BYTES,
            "pages": settings.pages,
            "per_tick": settings.pages_per_tick,
            "multiplier": _MULTIPLIER,
            "stride": _STRIDE,
            "page_lap": settings.pages * _MULTIPLIER,
            "block_lap": settings.blocks * _MULTIPLIER,
            "blocks": settings.blocks,
            "words": settings.sectors_per_block * SECTOR_BYTES // 4,
            "sectors": settings.sectors_per_block,
            "first": settings.first_sector,
            "last": settings.first_sector + settings.blocks * settings.sectors_per_block,
            "drives": int.from_bytes(bytes(settings.drives), "little"),
        },
        _ORIGIN,
    )
    if len(code) > SECTOR_BYTES - 2:
        raise ValueError(f"the guest has {len(code)} bytes; a boot sector holds {SECTOR_BYTES - 2}")
    return code.ljust(SECTOR_BYTES - 2, b"\0") + b"\x55\xaa"
