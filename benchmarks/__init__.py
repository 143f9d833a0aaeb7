"""Measurements. Each is a command with --json; none of them is a test."""
