"""What `Limiter.observe` tells: the events of limiters."""

from asyncbucket.engine.events import *  # noqa: F403 - all its public names
