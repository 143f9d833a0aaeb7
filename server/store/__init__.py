"""Adapters at rest: the neutral artifact, foreign checkpoint formats, versions and releases."""
