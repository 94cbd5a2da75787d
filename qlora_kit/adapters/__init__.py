"""LoRA branches beside frozen linears: injection, initialisation, PEFT's file format."""
