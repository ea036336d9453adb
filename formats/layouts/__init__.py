"""What lies on a disk: partition tables, file systems' used blocks, LVM."""
