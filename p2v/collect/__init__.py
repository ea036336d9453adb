"""Origins: where machines are taken from."""
