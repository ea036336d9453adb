"""How a machine is kept, and proven to come back."""
