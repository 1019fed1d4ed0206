"""From an adapter to what other programs read."""
