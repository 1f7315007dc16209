"""Which units tell positive from negative completions: counted, merged, resumed, ranked."""
