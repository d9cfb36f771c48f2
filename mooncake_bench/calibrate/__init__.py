"""What does an engine or endpoint cost? Measured points (`probe.py` from outside, `served.py` from a
run that it has served, `alone.py` in this process) and the profile that fits them (`fit.py`)."""
