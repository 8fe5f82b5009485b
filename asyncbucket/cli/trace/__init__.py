"""`asyncbucket plot`: a trace as a picture."""
