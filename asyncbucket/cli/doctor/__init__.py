"""`asyncbucket doctor`: what is installed and set up here, what of it is wrong, and the remedy.

`findings` says what a finding is, `installed` looks at packages, `surroundings` at the interpreter
and the settings, `shared` at a store, `options` is what can be typed and shows it all.
"""
