"""For tests: a runtime in the test's own process, in virtual time."""
