"""The real machines of the test suite: recipes, a builder of bootable disks, and the machine that boots them."""
