"""qlora_kit: QLoRA fine-tuning for people whose memory is the limit. Importing it imports nothing heavy."""

__version__ = "0.1.0"

import os

# Read by torch at its first allocation: large CPU tensors on 2 MiB pages. Without it a third of a step on a CPU goes
# into page faults of fresh tensors. A value that the user has set stays.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
