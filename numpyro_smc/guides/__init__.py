"""Guides that are built for the user."""
