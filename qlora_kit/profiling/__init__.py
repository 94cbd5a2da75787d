"""Measured memory, by the components of the ledger."""
