"""Many items through one function, behind one limiter: `Limiter.amap`.

`results` is what one calls and iterates over, and runs the workers; `caller` decides who acquires,
`checkpoint` remembers results, `progress` shows them.

Needs `pip install "asyncbucket[batch]"`.
"""

from importlib.util import find_spec

if not (find_spec("anyio") and find_spec("rich")):
    raise ImportError('amap needs anyio and rich: pip install "asyncbucket[batch]"')

from asyncbucket.batch.checkpoint import CheckpointError
from asyncbucket.batch.results import Item, Results, amap

__all__ = ["CheckpointError", "Item", "Results", "amap"]
