"""The figures of the Mooncake papers, published and ours: plan, work, judge, show."""
