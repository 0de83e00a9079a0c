"""Thin adapters between the core and frameworks; each module imports its framework only when it is used."""
