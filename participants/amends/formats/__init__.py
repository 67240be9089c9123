"""Texts that a definition can be written in: their content, and where in the text it stands."""

from amends.formats.parsed import Parsed, Place, Unreadable

__all__ = ["Parsed", "Place", "Unreadable"]
