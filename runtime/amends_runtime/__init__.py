"""The amends runtime: the engine that runs sagas durably."""
