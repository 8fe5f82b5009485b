"""What providers publish about their limits, with date and source."""

from asyncbucket.settings import Preset, PresetWarning, preset, preset_names

__all__ = ["Preset", "PresetWarning", "preset", "preset_names"]
