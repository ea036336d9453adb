"""What a machine is booted on, and the verdict on it."""
