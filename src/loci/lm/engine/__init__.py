"""Engines: what runs a model one step at a time."""
