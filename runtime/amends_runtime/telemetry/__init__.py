"""Onlookers: what the runtime tells people and programs about what it does."""
