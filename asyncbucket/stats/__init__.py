"""Observe a running limiter: a local endpoint, and a trace for a plot.

`report` collects what can be seen, as plain values and as Prometheus's text; `server` serves it on
this machine; `trace` keeps the latest admissions.
"""

from asyncbucket.stats.report import report
from asyncbucket.stats.server import StatsServer, serve_stats
from asyncbucket.stats.trace import Trace

__all__ = ["StatsServer", "Trace", "report", "serve_stats"]
