"""`asyncbucket plan`: how long calls would take under limits, and what binds.

`options` defines the options, `report` writes to a terminal, `picture` to a file.
"""
