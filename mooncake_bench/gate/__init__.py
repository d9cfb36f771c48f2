"""Did it get worse? Runs against a baseline: the run is the sample, never the request."""
