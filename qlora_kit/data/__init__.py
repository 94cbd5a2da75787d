"""From a user's file to batches of token ids, labels and positions."""
