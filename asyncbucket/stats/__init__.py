"""Look at a running limiter: a local endpoint, and a trace for a plot.

`report` says what there is to see, as plain values and as Prometheus's text; `server` gives it to
whoever asks on this machine; `trace` keeps the last admissions.
"""

from asyncbucket.stats.report import report
from asyncbucket.stats.server import StatsServer, serve_stats
from asyncbucket.stats.trace import Trace

__all__ = ["StatsServer", "Trace", "report", "serve_stats"]
