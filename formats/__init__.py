"""What a machine looks like at rest: disks, images, layouts and definitions.

This package knows no host, no terminal and no wall clock.

Glossary (one word per thing, used everywhere):

Machine        the record of what a computer is: firmware, CPU, memory, disks, NICs, operating system, boot.
Disk           one of a machine's block devices, named by a stable id that does not depend on probing order.
Extent         a run of bytes on a disk and what it holds: DATA, ZERO or HOLE.
BlockSource    bytes at offsets, to read, with a map of extents.
BlockSink      bytes at offsets, to write.
Origin         where a machine is taken from: an SSH host, a hypervisor's VM, files.
Capture        one machine at one instant: its record and a BlockSource for each disk.
Mark           what an origin needs to tell later what changed on a disk since a capture.
Notice         a warning that counts: listed, and the run ends with exit code 3.
Chunk          a run of a disk's bytes that the repository stores once.
Pack           a stored object that holds many chunks.
Index          where each chunk lies.
RecoveryPoint  a capture kept in a repository.
Repository     a place that keeps recovery points.
Store          names to immutable bytes, below a repository.
Destination    where a machine is put: a folder, a hypervisor, a device.
Artifact       what was put there: disks and the definition that a platform opens.
Target         what a machine is booted on to learn whether it boots.
Verdict        what a target saw: static < hand-off < boots, and pass, fail or unproven.
Drill          a recovery point restored or served, and booted, for a verdict.
Snapshot       only the hypervisor's or volume manager's.
"""
