"""What happened in these runs, and why? A web page over run directories, for a browser."""
