"""The frozen base model: reading its files, quantizing its linears, building its modules."""
