"""The quickstart: a real small model and real data out of two published wheels, and the proof of both."""
