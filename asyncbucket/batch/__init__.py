"""Many items through one function, behind one limiter: `Limiter.amap` and `Limiter.map`.

From the inside out: `item` is what comes out, `keys` and `checkpoint` remember it, `source` hands
out what goes in, `pacing` decides who acquires, `engine` runs the workers, `results` is what one
iterates over, `progress` shows it, `threads` serves code without an event loop.

Needs `pip install "asyncbucket[batch]"`.
"""

from importlib.util import find_spec

if not find_spec("anyio"):
    raise ImportError('amap and map need anyio: pip install "asyncbucket[batch]"')

from asyncbucket.batch.checkpoint import Checkpoint, CheckpointError
from asyncbucket.batch.item import Item
from asyncbucket.batch.results import Results, amap
from asyncbucket.batch.threads import map_sync

__all__ = ["Checkpoint", "CheckpointError", "Item", "Results", "amap", "map_sync"]
