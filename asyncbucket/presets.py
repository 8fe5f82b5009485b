"""What providers publish about their limits, with date and source."""

from asyncbucket.core.presets import *  # noqa: F403 - all its public names
