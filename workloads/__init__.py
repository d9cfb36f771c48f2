"""Where load comes from: real traces, transforms of them, and generators like them."""
