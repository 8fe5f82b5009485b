"""What models cost, with date and source: `Price`, and the price of a model."""

from asyncbucket.providers.prices import *  # noqa: F403 - all its public names
