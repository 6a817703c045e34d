"""Row maps and weight plans: what a rewrite does to parameters, as data."""
