"""Searching for settings: many adapters trained at once over one base."""
