"""How a machine is taken, moved and made to boot."""
