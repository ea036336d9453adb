"""VM definitions: one module a platform."""
