"""What computes tokens, or models the time it takes."""
