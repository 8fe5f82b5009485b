"""`asyncbucket plan`: how long calls would take under limits, what binds, what other limits are worth.

`options` is what can be typed, `report` what is seen in a terminal, `picture` what goes into a file.
"""
