"""`asyncbucket doctor`: what is installed and configured here, what is wrong, and the remedy.

`findings` defines what a finding is, `installed` checks packages, `surroundings` the interpreter
and the settings, `shared` a store, `options` defines the options and shows the findings.
"""
