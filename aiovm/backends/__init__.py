"""What stands behind the virtio devices: files, streams and a network, as citizens of asyncio."""

from aiovm.backends.base import Backend
from aiovm.backends.console import ConsolePort
from aiovm.backends.disk import Disk
from aiovm.backends.entropy import Entropy
from aiovm.backends.net.stack import UserNet
from aiovm.backends.storage import FileStorage, Overlay, Storage
from aiovm.backends.vsock import Vsock

__all__ = ["Backend", "ConsolePort", "Disk", "Entropy", "FileStorage", "Overlay", "Storage", "UserNet", "Vsock"]
