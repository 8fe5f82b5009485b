"""`asyncbucket watch`: what running limiters do, live, in a terminal.

`options` is what can be typed, `source` asks, `view` says what it means, `screen` shows it.
"""
