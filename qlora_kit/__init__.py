"""qlora_kit: QLoRA fine-tuning for people whose memory is the limit. Importing it imports nothing heavy."""

__version__ = "0.1.0"
