"""What a run will take, computed from a config alone: no torch behind these modules."""
