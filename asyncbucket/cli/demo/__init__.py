"""`asyncbucket demo`: the same agents under the same limits, without asyncbucket and with it.

From the inside out: `scenario` says what is run, `traffic` counts what goes over the wire, `load`
is the agents, `outcome` turns counts into figures, `screen` shows them as they grow and `report`
when they are final, `command` ties it together.
"""
