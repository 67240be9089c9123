"""The way out: one lane per participant, and the transports that carry its calls."""
