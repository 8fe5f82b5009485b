"""The limiter: the standard library alone, and no task but the one that waits for limits."""
