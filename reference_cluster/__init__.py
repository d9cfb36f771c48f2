"""The system under test: a disaggregated serving cluster modelled on Mooncake."""
