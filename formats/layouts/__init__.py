"""What lies on a disk: partition tables, file systems' used blocks, LVM.

``disk.used_of_disks`` puts it together. Everything here only reads, through the BlockSource waist, and never trusts
what it reads.
"""
