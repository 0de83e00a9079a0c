"""The zoo: one row per published row."""
