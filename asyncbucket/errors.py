"""What can go wrong: each error says what, the numbers and the remedy."""

from asyncbucket.engine.errors import *  # noqa: F403 - all its public names
