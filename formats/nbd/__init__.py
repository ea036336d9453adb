"""NBD, the wire form of the block waist: any ``BlockSource`` as a URI for other programs, any URI as a ``BlockSource``.

Import names from here; the modules below are the parts: ``wire`` (bytes), ``client``, ``server``.
"""

from formats.nbd.client import NbdDisk, connect
from formats.nbd.server import NbdServer
from formats.nbd.wire import NbdAddress

__all__ = ["NbdAddress", "NbdDisk", "NbdServer", "connect"]
