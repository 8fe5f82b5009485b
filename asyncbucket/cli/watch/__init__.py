"""`asyncbucket watch`: what running limiters do, live, in a terminal.

`options` defines the options, `source` reads the state, `view` interprets it, `screen` shows it.
"""
