"""What is known of providers: what a request costs there, what replies and refusals say.

`profiles` has the providers themselves; `request` measures what a request asks for, and forecasts
how long a reply will be; `usage` finds what a call did cost, and `prices` what that is in dollars;
`errors` tells what a failure means, and `learn` what answers tell the limiter. Nothing here sends or
retries anything. The facts are in TOML files, each with its source and date.
"""

import tomllib
from importlib.resources import files
from typing import Any


def facts(name: str) -> dict[str, Any]:
    """Return what the file ``name`` of this package says."""
    return tomllib.loads(files(__name__).joinpath(name).read_text("utf-8"))
