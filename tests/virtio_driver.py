"""The guest's side of a virtio device: rings in guest memory, registers as a driver uses them. Numbers are literal."""

import struct

from aiovm.irq import IrqLine
from aiovm.memory import GuestMemory

RAM = 0x40_0000
NEXT, WRITE, INDIRECT = 1, 2, 4


def ram(size=RAM):
    memory = GuestMemory()
    memory.set_region(0, 0, size)
    return memory


class Ring:
    """The driver's half of one queue."""

    def __init__(self, memory, base, size):
        self.memory = memory
        self.size = size
        self.table = base
        self.avail = base + 16 * size
        self.used = (self.avail + 6 + 2 * size + 15) & ~15
        self.buffers = (self.used + 6 + 8 * size + 0xFFF) & ~0xFFF
        self.offered = 0
        self.seen = 0
        self.free = 0

    def descriptor(self, index, address, length, flags=0, following=0):
        self.memory.write(self.table + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def offer(self, head):
        """Make a chain available."""
        self.memory.write_u(self.avail + 4 + 2 * (self.offered % self.size), 2, head)
        self.offered = (self.offered + 1) & 0xFFFF
        self.memory.write_u(self.avail + 2, 2, self.offered)

    def add(self, *pieces):
        """Offer one chain: bytes are readable, an int is a writable piece of that length; (head, addresses)."""
        head = self.free % self.size
        addresses = []
        for at, piece in enumerate(pieces):
            index = (head + at) % self.size
            length = piece if isinstance(piece, int) else len(piece)
            address = self.buffers
            self.buffers += (length + 15) & ~15
            if not isinstance(piece, int):
                self.memory.write(address, piece)
            flags = (WRITE if isinstance(piece, int) else 0) | (NEXT if at + 1 < len(pieces) else 0)
            self.descriptor(index, address, length, flags, (index + 1) % self.size)
            addresses.append(address)
        self.free += len(pieces)
        self.offer(head)
        return head, addresses

    def take(self):
        """What the device has given back since the last call: [(head, written)]."""
        back = []
        while self.seen != self.memory.read_u(self.used + 2, 2):
            at = self.used + 4 + 8 * (self.seen % self.size)
            back.append(struct.unpack("<II", self.memory.read(at, 8)))
            self.seen = (self.seen + 1) & 0xFFFF
        return back


class Driver:
    """A driver that has brought ``device`` up. ``make(memory, irq)`` makes the device."""

    def __init__(self, make, *, size=16, features=None, start=True, memory=None):
        self.memory = ram() if memory is None else memory
        self.levels = []
        self.irq = IrqLine(self.levels.append)
        self.device = make(self.memory, self.irq)
        self.size = size
        self.rings = []
        if start:
            self.start(features)

    def get(self, offset, size=4):
        return self.device.read(offset, size, 0)

    def set(self, offset, value, size=4):
        self.device.write(offset, size, value, 0)

    def features(self):
        self.set(0x14, 0)
        low = self.get(0x10)
        self.set(0x14, 1)
        return low | self.get(0x10) << 32

    def start(self, features=None):
        """3.1.1: acknowledge, driver, features, features OK, queues, driver OK."""
        self.set(0x70, 0)
        self.set(0x70, 1)
        self.set(0x70, 3)
        features = self.features() & ~(1 << 29) if features is None else features
        for half in (0, 1):
            self.set(0x24, half)
            self.set(0x20, features >> 32 * half & 0xFFFF_FFFF)
        self.set(0x70, 0xB)
        assert self.get(0x70) == 0xB
        self.rings = []
        base = 0x10_0000
        while True:
            self.set(0x30, len(self.rings))
            if not self.get(0x34):
                break
            ring = Ring(self.memory, base, self.size)
            self.memory.write(ring.avail, bytes(6 + 2 * self.size))
            self.memory.write(ring.used, bytes(6 + 8 * self.size))
            base += 0x8_0000
            self.set(0x38, self.size)
            for at, address in ((0x80, ring.table), (0x90, ring.avail), (0xA0, ring.used)):
                self.set(at, address & 0xFFFF_FFFF)
                self.set(at + 4, address >> 32)
            self.set(0x44, 1)
            assert self.get(0x44) == 1
            self.rings.append(ring)
        self.set(0x30, 0)
        self.set(0x70, 0xF)

    def kick(self, queue):
        self.set(0x50, queue)

    def send(self, queue, *pieces):
        """Offer a chain and notify: (head, addresses)."""
        answer = self.rings[queue].add(*pieces)
        self.kick(queue)
        return answer

    def acknowledge(self):
        """InterruptStatus, acknowledged."""
        cause = self.get(0x60)
        self.set(0x64, cause)
        return cause

    @property
    def needs_reset(self):
        return bool(self.get(0x70) & 0x40)
