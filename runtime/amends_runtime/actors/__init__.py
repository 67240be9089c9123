"""The engine's heart: mailboxes, actors, turns, timers, and the supervisor that owns them."""
