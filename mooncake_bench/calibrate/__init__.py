"""What does an engine or endpoint cost? Measured points and the profile that fits them (`fit.py`).

Points come from outside (`probe.py`), from a run that was served (`served.py`), or from an engine
in this process (`alone.py`).
"""
